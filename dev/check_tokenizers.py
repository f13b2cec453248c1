"""Token ids of this program against those of Hugging Face's tokenizers, for every published kind of byte-level BPE:

    python dev/check_tokenizers.py [--real DIR] [--time] [KIND …]       (pip install tokenizers; make first)

Vocabularies of 8000 tokens are trained here, on tinyshakespeare, GSM8K, Python's own source and a little of many
languages; normaliser, pre-tokenizer, post-processor, decoder and added tokens are those of the published
tokenizer.json. DIR holds tinyshakespeare.txt, gsm8k/ and tokenizers/gpt2 (skipped where they are not)."""

import argparse, glob, json, os, random, resource, subprocess, sys, tempfile, time, unicodedata
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
import tokenizers

LETTERS = ("A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
           "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
           "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃")
ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + ENDS
QWEN = ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + ENDS
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENGLISH}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENGLISH}?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
             r"\s*[\r\n]+|\s+(?!\S)|\s+")


def split(regex, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def byte_level(regex=False, space=False, trim=True):
    return {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": trim, "use_regex": regex}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def template(token):
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [token], "tokens": [token]}}}


def added(content, **more):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True, **more}


DIGITS = {"type": "Digits", "individual_digits": True}
CHAT = [added("<|endoftext|>"), added("<|im_start|>"), added("<|im_end|>")]
NFC = {"type": "NFC"}
EMPTY = {"type": "Sequence", "normalizers": []}
BEGIN3 = {"type": "Sequence", "processors": [byte_level(True, True, False), template("<|begin_of_text|>")]}
DEEP = [added("<｜begin▁of▁sentence｜>", normalized=True), added("<｜end▁of▁sentence｜>", normalized=True),
        added("<|EOT|>", special=False, normalized=True), added("ü", special=False, normalized=True)]
# name: normaliser, pre-tokenizer, post-processor, added tokens, ignore_merges, which of the added tokens stand in the
# vocabulary, too
KINDS = {
    "gpt2": (None, byte_level(True), byte_level(True, trim=False), CHAT[:1], False, True),
    "gpt2-space": (None, byte_level(True, True), None, CHAT[:1], False, True),
    "llama3": (None, sequence(split(LLAMA3), byte_level()), BEGIN3,
               [added(t) for t in ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                                   "<|eot_id|>")], True, False),
    "qwen2.5": (NFC, sequence(split(QWEN), byte_level(trim=False)), byte_level(trim=False),
                CHAT + [added("<tool_call>", special=False), added("</tool_call>", special=False)], False, False),
    "qwen3": (NFC, sequence(split(QWEN), byte_level(trim=False)), byte_level(trim=False),
              CHAT + [added("<think>", special=False), added("</think>", special=False)], False, False),
    "smollm2": (None, sequence(DIGITS, byte_level(True)), None, CHAT + [added("<repo_name>")], False, True),
    "deepseek-llm": (EMPTY, sequence(split("[\r\n]"), split(rf"\s?[{LETTERS}]+"),
                                     split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"), split(r"\s+$"),
                                     split("[一-龥ࠀ-一가-퟿]+"), DIGITS, byte_level()),
                     byte_level(True, True, False), DEEP, False, False),
    "deepseek-coder": (EMPTY, sequence(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"),
                                       split("[一-龥ࠀ-一가-퟿]+"), DIGITS, byte_level()),
                       byte_level(True, True, False), DEEP, False, False),
    "deepseek-v3": (EMPTY, sequence(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"),
                                    split(DEEPSEEK3), byte_level()),
                    template("<｜begin▁of▁sentence｜>"), DEEP, False, False),
    "gpt4o": (None, sequence(split(GPT4O), byte_level()), None, CHAT[:1], False, False),
    "tekken": (None, sequence(split(TEKKEN), byte_level()), template("<s>"),
               [added("<s>"), added("</s>"), added("[INST]")], True, False),
    "removed": (None, sequence(split(LLAMA3, "Removed", True), {"type": "Digits", "individual_digits": False}, byte_level()),
                None, CHAT[:1], False, False),
    "odd-added": (NFC, sequence(split(QWEN), byte_level()), None,
                  CHAT + [added("<l>", lstrip=True), added("<r>", rstrip=True), added("<w>", single_word=True),
                          added("wor", single_word=True, special=False),
                          added("cafe\u0301", normalized=True, special=False), added("\u00e9t", special=False),
                          added("  ", special=False, normalized=True)], False, False),
}
WORDS = ("the and Hello 'S 'll I'VE don't ſ 'ſ K naïve café e\u0301 ﬁ ½ ² Ⅷ ٣٤ 123 4567 "
         "3.14 αβγ Привет мир 你好 世界 。 ， 한국어 가나 ひらがな カタカナ ー العربية ، عَرَبِيّ שלום "
         "हिन्दी ไทย 👩‍👩‍👧 🏳️‍🌈 👍🏽 😀 ❤️ _ __init__ == -> // \\ "
         "<|im_start|> <|im_end|> <|endoftext|> <|begin_of_text|> <|eot_id|> <think> </tool_call> <repo_name> <s> [INST] "
         "<｜begin▁of▁sentence｜> <|EOT|> ü u\u0308 <l> <r> <w> wor \u00e9t q\u0307\u0323 \u1e0b\u0323 "
         "\u212b \u2126 \uac01 \u1100\u1161\u11a8 \U0001d160 \u0344").split()
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\u180e", "\u200b", "\u0085", "\x0b",
          "\x1c", "\ufeff", ""]


def random_text(rng):
    """Words, spaces, control characters and characters of every plane."""
    def part():
        kind = rng.random()
        if kind < .4: return rng.choice(WORDS)
        if kind < .7: return rng.choice(SPACES)
        if kind < .8: return chr(rng.randrange(0x80))
        if kind < .9: return chr(rng.choice([rng.randrange(0x80, 0xd800), rng.randrange(0xe000, 0x3000 + 0xe000) % 0x10000,
                                             rng.randrange(0x300, 0x370)]))
        return chr(rng.randrange(0x10000, 0x110000) if rng.random() < .3 else
                   rng.choice([0x1f468, 0x200d, 0x1f3fd, 0xfe0f, 0x20e3, 0x0301, 0x0323, 0x1161, 0x11a8]))
    text = "".join(part() for _ in range(rng.randrange(1, 30)))
    return "".join(c for c in text if not 0xd800 <= ord(c) < 0xe000 and known(c)).replace("\0", "")


def known(c):
    """Of Python's Unicode, and of the judge's: its NFC is Unicode 9's, and takes later marks for letters."""
    mark = unicodedata.combining(c) and c not in "\u0334\u0335" and \
        unicodedata.normalize("NFC", "a" + c + "\u0334") != "a" + c + "\u0334"
    late = mark and tokenizers.normalizers.NFC().normalize_str("a" + c + "\u0334") == "a" + c + "\u0334"
    late = late or unicodedata.normalize("NFC", c) != tokenizers.normalizers.NFC().normalize_str(c)
    return unicodedata.category(c) != "Cn" and not late


def corpora(real):
    """name: texts"""
    texts = {}
    path = os.path.join(real, "tinyshakespeare.txt")
    if os.path.exists(path):
        whole = open(path).read()
        texts["tinyshakespeare"] = [whole] + whole.split("\n\n")
    path = os.path.join(real, "gsm8k", "train.jsonl")
    if os.path.exists(path):
        rows = [json.loads(line) for line in open(path)]
        texts["gsm8k"] = [f"{row['question']}\n{row['answer']}" for row in rows]
    texts["code"] = [open(path, encoding="utf-8", errors="ignore").read()
                     for path in sorted(glob.glob(os.path.dirname(os.__file__) + "/*.py"))[:80]] \
        + [open(path, encoding="utf-8").read() for path in glob.glob("*.[ch]") + glob.glob("doc/*.md")]
    lines = ["人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。2024年3月15日，价格是￥1,234.50元！",
             "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。", "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
             "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق. وقد وُهِبوا عقلاً وضميراً ١٢٣٤",
             "Все люди рождаются свободными и равными в своём достоинстве и правах.",
             "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
             "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
             "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 ok 1️⃣ 🇩🇪🇫🇷 ❤️‍🔥 done",
             "Ngũ Hành Sơn – Việt Nam, Zürich, Ærøskøbing, Łódź, İstanbul, ﬁnally, Å vs Å vs Å"]
    texts["languages"] = lines + ["\n".join(lines)] + [line[i:] for line in lines for i in range(0, 12)]
    texts["control"] = [bytes(range(1, 128)).decode(), "a\x00b".replace("\0", "\x01"),
                        "\x7f\x80\x85\u200e\u202e\ufeff", "\r\r\n\n\r", "tab\tand\x0bvt\x0cff",
                        "x" * 5000, " " * 3000, "\n" * 3000, " \n" * 999,
                        "e\u0301" * 500, "a" + "\u0301\u0316" * 300, "\u1100\u1161\u11a8" * 50]
    return texts


def train(name, texts, folder):
    normalizer, pre_tokenizer, post_processor, tokens, ignore_merges, in_vocabulary = KINDS[name]
    tokens = [dict(token) for token in tokens]
    blank = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer,
             "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": byte_level(True, True),
             "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                       "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
                       "vocab": {}, "merges": []}}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(blank))
    special = [token["content"] for token in tokens] if in_vocabulary else []
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8000, special_tokens=special, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([t for name in texts for t in texts[name][-4000:]], trainer)
    made = json.loads(tokenizer.to_str())
    vocabulary = made["model"]["vocab"]
    if name == "smollm2":                               # SmolLM2 itself has no token for these bytes
        gone = {"ĕ", "Ė", "ĝ", "ñ", "ò"}
        made["model"]["merges"] = [m for m in made["model"]["merges"] if not set("".join(m)) & gone]
        keep = [t for t in vocabulary if not set(t) & gone]
        vocabulary = made["model"]["vocab"] = {t: i for i, t in enumerate(sorted(keep, key=vocabulary.get))}
    if ignore_merges:                                   # a word that the merges do not make
        vocabulary["Ġzebrafish"] = len(vocabulary)
    for token in tokens:
        token["id"] = vocabulary.get(token["content"], None)
        if token["id"] is None:
            token["id"] = max(list(vocabulary.values()) + [t["id"] for t in tokens if t.get("id") is not None]) + 1
    ids = {token["content"]: token["id"] for token in tokens}
    text = json.dumps(post_processor)
    if post_processor:
        post_processor = json.loads(text, object_hook=lambda d: {**d, "ids": [ids[i] for i in d["ids"]]} if "ids" in d else d)
    made.update(added_tokens=tokens, post_processor=post_processor)
    if name in ("gpt2", "llama3", "deepseek-llm"):      # older files spell a merge as one text
        made["model"]["merges"] = [" ".join(m) for m in made["model"]["merges"]]
    json.dump(made, open(os.path.join(folder, "tokenizer.json"), "w"), ensure_ascii=False)
    json.dump({"eos_token": tokens[-1]["content"]}, open(os.path.join(folder, "tokenizer_config.json"), "w"))
    return tokenizers.Tokenizer.from_str(json.dumps(made))


def ours(folder, texts):
    rows = os.path.join(folder, "rows.jsonl")
    with open(rows, "w", encoding="utf-8") as file:
        for text in texts: file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    said = subprocess.run(["./train", "--tokenize", rows, "--model", folder], capture_output=True, text=True)
    if said.returncode: sys.exit(said.stderr)
    return [json.loads(line) for line in said.stdout.splitlines()]


def timed(name, judge, folder, texts):
    """Processor seconds of one thread for ten million bytes, in rows of a thousand characters; this program's with reading the
    rows and printing the ids, without reading the tokenizer."""
    english = texts["tinyshakespeare"][0] + "".join(texts["gsm8k"][:5000])
    for what, text in (("English", english), ("mixed", "".join(texts["code"] + texts["languages"][:9] * 200))):
        text = (text * (10_000_000 // len(text.encode()) + 1)).encode()[:10_000_000].decode(errors="ignore")
        rows = [text[i:i + 1000] for i in range(0, len(text), 1000)]
        start = time.process_time()
        judge.encode_batch_fast(rows, add_special_tokens=False)
        theirs = time.process_time() - start
        used = [resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime]
        for part in (rows[:1], rows):
            ours(folder, part)
            used.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
        here = used[2] - 2 * used[1] + used[0]
        print(f"  {name:15} {what:8} {theirs:6.2f} s, here {here:5.2f} s: {theirs / here:4.1f} times as fast", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--real", default="../shared/real")
    parser.add_argument("--strings", type=int, default=10000)
    parser.add_argument("--time", action="store_true")
    arguments = parser.parse_args()
    texts, failed = corpora(arguments.real), 0
    rng = random.Random(1)
    texts["random"] = [text for text in (random_text(rng) for _ in range(arguments.strings)) if text]
    for name in arguments.kinds or list(KINDS):
        with tempfile.TemporaryDirectory() as folder:
            judge = train(name, {k: v for k, v in texts.items() if k != "random"}, folder)
            if arguments.time:
                timed(name, judge, folder, texts)
                continue
            for corpus, lines in texts.items():
                want = [judge.encode(line, add_special_tokens=False).ids for line in lines]
                got = ours(folder, lines)
                wrong = [i for i in range(len(lines)) if want[i] != got[i]]
                failed += len(wrong)
                print(f"{'✗' if wrong else '✓'} {name:15} {corpus:15} {len(lines):6} texts, {sum(map(len, want)):9} ids, "
                      f"{len(wrong)} differ", flush=True)
                for i in wrong[:2]:
                    k = next((k for k, (a, b) in enumerate(zip(want[i], got[i])) if a != b), 0)
                    print("   ", ascii(lines[i][:200]), k, [judge.id_to_token(x) for x in want[i][max(k - 2, 0):k + 4]],
                          [judge.id_to_token(x) for x in got[i][max(k - 2, 0):k + 4]])
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
