"""Writes what this project bundles: little stories to pretrain on, word problems to fine-tune on, a tokenizer for both.

    python3 dev/make_data.py --stories build/stories.jsonl --count 150000 --seed 1

Stories are plain text with true counts in them ("Lily had 5 shells. She found 3 more. Now Lily had 8 shells."). They
hold no question and no answer. The problems ask about the same small world inside the prompt of fine-tuning, and end in
GSM8K's "#### 8". A problem's template is the tuple of sentence patterns it is made of; data/val.jsonl uses templates of
which data/train.jsonl holds no instance. The same seed gives the same bytes.
"""
import argparse
import io
import json
import os
import random

PEOPLE = [("Lily", "She", "her"), ("Tom", "He", "his"), ("Mia", "She", "her"), ("Sam", "He", "his"),
          ("Anna", "She", "her"), ("Ben", "He", "his"), ("Lucy", "She", "her"), ("Max", "He", "his"),
          ("Sue", "She", "her"), ("Tim", "He", "his"), ("Kate", "She", "her"), ("Leo", "He", "his"),
          ("Emma", "She", "her"), ("Jack", "He", "his"), ("Rosa", "She", "her"), ("Finn", "He", "his")]

# one, many
THINGS = [("shell", "shells"), ("apple", "apples"), ("ball", "balls"), ("stone", "stones"), ("flower", "flowers"),
          ("cookie", "cookies"), ("book", "books"), ("coin", "coins"), ("button", "buttons"), ("leaf", "leaves"),
          ("toy", "toys"), ("cup", "cups"), ("star", "stars"), ("card", "cards"), ("egg", "eggs"), ("nut", "nuts"),
          ("pear", "pears"), ("block", "blocks"), ("feather", "feathers"), ("cake", "cakes")]

BOXES = ["box", "bag", "basket", "jar", "drawer", "chest"]
PLACES = ["park", "garden", "forest", "house", "kitchen", "school", "field", "barn", "yard", "market"]

# {N} a name, {P} its pronoun, {M} another name, {h} her or his, {b} a number, {t} the thing in the form that b asks for
SETUPS = ["{N} had {a} {t}.", "There were {a} {t} in {N}'s {x}.", "{N} kept {a} {t} in a {x}.", "{N} counted {a} {t} at home.",
          "{N} took {a} {t} to the {l}."]
GAINS = ["{P} found {b} more {t}.", "Then {P0} got {b} more {t}.", "{P} bought {b} {t} at the market.", "{M} gave {N} {b} {t}.",
         "{P} picked up {b} more {t}.", "Mom gave {N} {b} more {t}.", "In the {l} {P0} found {b} {t}.",
         "{P} was given {b} {t} by {M}.", "{N} made {b} new {t}.", "{P} won {b} {t} in a game."]
LOSSES = ["{P} lost {b} {t}.", "Then {P0} gave {b} {t} to {M}.", "{P} dropped {b} {t} in the {l}.", "{M} took {b} {t} from {N}.",
          "{P} sold {b} {t} at the market.", "A dog ran away with {b} {t}.", "{N} gave {b} {t} away.",
          "{P} left {b} {t} in the {l}.", "{b} {t} fell into the water.", "{P} threw away {b} {t}."]
RESULTS = ["Now {N} had {c} {t}.", "That made {c} {t}.", "So there were {c} {t} now.", "Now {N} had {c} {t}.",
           "After that {N} had {c} {t}."]
QUESTIONS = ["How many {T} does {N} have now?", "How many {T} are there now?", "Now how many {T} does {N} have?",
             "Tell how many {T} {N} has in the end.", "What is the number of {T} that {N} has now?"]

FILLERS = ["It was a sunny day.", "It was a cold morning.", "The sky was blue.", "The birds sang in the trees.",
           "{N} was very happy.", "{N} was a little sad.", "{N} liked the {T} a lot.", "{P} smiled.",
           "{N} and {M} were good friends.", "They played in the {l}.", "{N} went to the {l}.", "{M} came to the {l} too.",
           "The wind was warm.", "{M} said hello.", "{N} put them in a {x}.", "Mom called from the {l}.", "It began to rain.",
           "The {T} were big and red.", "The {T} were small and green.", "{N} ran home.", "The sun went down.", "{M} laughed.",
           "{P} sat down under a tree.", "They were tired and went to sleep.", "{N} thanked {M}.", "What a nice day it was!"]
OPENINGS = ["Once there was a child named {N}.", "One day {N} went to the {l}.", "{N} lived near the {l}.",
            "{N} and {M} were in the {l}.", "One morning {N} woke up early.", "It was a sunny day."]

PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n{question}\n\n### Response:{answer}")
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MOST = 20                               # no count is ever larger


class Scene:
    """Who, what and where of one text, and the sentences it lends its words to."""

    def __init__(self, rng):
        self.rng = rng
        (self.name, self.pronoun, self.her), (self.other, _, _) = rng.sample(PEOPLE, 2)
        self.one, self.many = rng.choice(THINGS)
        self.box = rng.choice(BOXES)

    def say(self, pattern, number=None):
        thing = self.one if number == 1 else self.many
        if number == 1:
            pattern = pattern.replace("There were", "There was").replace("there were", "there was")
        return pattern.format(N=self.name, P=self.pronoun, P0=self.pronoun.lower(), M=self.other, h=self.her, T=self.many,
                              t=thing, x=self.box, l=self.rng.choice(PLACES), a=number, b=number, c=number)

    def change(self, count, patterns=None):
        """A change that keeps 0 … MOST: its pattern, its size, the count after it."""
        gain = self.rng.random() < 0.5 if patterns is None else patterns in GAINS
        if patterns is None and (count == 0 or count == MOST):
            gain = count == 0
        pattern = self.rng.choice(GAINS if gain else LOSSES) if patterns is None else patterns
        most = MOST - count if gain else count
        if most < 1:
            return None
        size = self.rng.randint(1, min(most, 10))
        return pattern, size, count + size if gain else count - size


def counting(scene, rng):
    """Someone counts things and they change. A result may follow at once, or wait until more has happened."""
    if rng.random() < 0.1:                                        # two people
        a, b = rng.randint(1, 10), rng.randint(1, 10)
        return [scene.say("{N} had {a} {t}.", a), scene.say("{M} had {b} {t}.", b),
                scene.say("Together they had {c} {t}.", a + b)]
    count, waiting = rng.randint(1, 14), []
    text = [scene.say(rng.choice(SETUPS), count)]
    for _ in range(rng.choice([1, 1, 2, 2, 3])):
        pattern, size, count = scene.change(count)
        text.append(scene.say(pattern, size))
        waiting.append(scene.say(rng.choice(RESULTS), count))
        if rng.random() < 0.5:
            text, waiting = text + waiting, []
        elif rng.random() < 0.5:
            text.append(scene.say(rng.choice(FILLERS)))
    return text + waiting


def story(rng):
    """One to three countings, of different things. Some stories have paragraphs, some the headings of a diary."""
    scene = Scene(rng)
    parts, form = [], rng.random()
    for i in range(rng.choice([1, 1, 2, 2, 3])):
        text = [scene.say(rng.choice(OPENINGS))] if i == 0 else []
        text += counting(scene, rng)
        if rng.random() < 0.6:
            text.append(scene.say(rng.choice(FILLERS)))
        parts.append(" ".join(text))
        scene.one, scene.many = rng.choice(THINGS)
    if form < 0.6:
        return " ".join(parts)
    if form < 0.8:
        return "\n".join(parts)
    heading = "#" * rng.randint(2, 4)
    return "\n\n".join(f"{heading} {day}:\n{part}" for day, part in zip(rng.sample(DAYS, len(parts)), parts))


def templates(rng):
    """Every one-step template and as many two-step ones, an eighth of both for validation."""
    one = [(s, c, q) for s in SETUPS for c in GAINS + LOSSES for q in QUESTIONS]
    two = [(s, c, d, q) for s in SETUPS for c in GAINS + LOSSES for d in GAINS + LOSSES for q in QUESTIONS]
    parts = []
    for group in (one, rng.sample(two, len(one))):
        rng.shuffle(group)
        parts.append((group[len(group) // 8:], group[:len(group) // 8]))
    return parts


def problem(rng, template):
    """A question made from a template, and its answer: the story's own next sentences, then #### and the number."""
    setup, *changes, question = template
    while True:
        scene = Scene(rng)
        count = rng.randint(1, 14)
        asked, answer = [scene.say(setup, count)], []
        for pattern in changes:
            step = scene.change(count, pattern)
            if step is None:
                break
            _, size, count = step
            asked.append(scene.say(pattern, size))
            answer.append(scene.say("Now {N} had {c} {t}.", count))
        else:
            return {"question": " ".join(asked + [scene.say(question)]), "answer": " ".join(answer) + f"\n#### {count}"}


def write_problems(rng, folder):
    (one_train, one_val), (two_train, two_val) = templates(rng)
    assert not set(one_train) & set(one_val) and not set(two_train) & set(two_val)
    patterns = {p for template in one_train + two_train for p in template}
    assert all(p in patterns for template in one_val + two_val for p in template), "a pattern of validation is never trained"
    seen = set()
    for name, count, one, two in (("train", 4000, one_train, two_train), ("val", 200, one_val, two_val)):
        rows = []
        while len(rows) < count:
            row = problem(rng, rng.choice(one if rng.random() < 0.6 else two))
            if row["question"] not in seen:
                seen.add(row["question"])
                rows.append(row)
        with open(os.path.join(folder, name + ".jsonl"), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{name}: {count} problems from {len(one)} one-step and {len(two)} two-step templates")
    return seen


def write_tokenizer(texts, path):
    import sentencepiece
    model = io.BytesIO()                # not a file: SentencePiece would write its path into the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=768, model_type="bpe", byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, max_sentence_length=100000,
        minloglevel=2)
    with open(path, "wb") as file:
        file.write(model.getvalue())
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    print(f"tokenizer: {tokenizer.vocab_size()} pieces, "
          f"{sum(len(tokenizer.encode(t)) for t in texts[:2000]) / 2000:.0f} tokens a story")
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", required=True, help="where the pretraining text goes, .jsonl")
    parser.add_argument("--count", type=int, default=150000, help="how many stories")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for folder in ("base", "data", os.path.dirname(arguments.stories) or "."):
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    rng = random.Random(arguments.seed)
    stories = [story(rng) for _ in range(arguments.count)]
    with open(arguments.stories, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in stories)
    questions = sorted(write_problems(random.Random(arguments.seed + 1), os.path.join(root, "data")))
    tokenizer = write_tokenizer(stories[:20000] + [PROMPT.format(question=q, answer="\n####") for q in questions[:100]],
                                os.path.join(root, "base", "tokenizer.model"))
    lengths = [len(tokenizer.encode(PROMPT.format(question=q, answer=""))) for q in questions]
    print(f"problems: {sum(lengths) / len(lengths):.0f} tokens a prompt, at most {max(lengths)}; stories: {len(stories)}")


if __name__ == "__main__":
    main()
