"""GLUE's tab-separated files as rows of instructions, whose answer is the label as a word: exact match is then the accuracy.

    python3 dev/glue_rows.py sst2 SST-2/train.tsv > train.jsonl
    python3 dev/glue_rows.py sst2 SST-2/dev.tsv > val.jsonl
    ./train --data train.jsonl --val val.jsonl --exact-match --max-new 4 …

A file is as GLUE publishes it: fields between tabs, quotes are text (QUOTE_NONE), CoLA without a line of names. Test files of
GLUE hold no labels and are refused.
"""
import argparse
import json
import sys

TASKS = {                               # names of the columns (CoLA's file has none), the question, the words of labels 0, 1
    "sst2": (None, ["sentence"], "label", "Is the sentiment of this sentence negative or positive?", ["negative", "positive"]),
    "cola": (["source", "label", "mark", "sentence"], ["sentence"], "label", "Is this sentence grammatically acceptable?",
             ["no", "yes"]),
    "mrpc": (None, ["#1 String", "#2 String"], "Quality", "Do these two sentences mean the same?", ["no", "yes"]),
    "qnli": (None, ["question", "sentence"], "label", "Does this sentence answer the question?",
             ["not_entailment", "entailment"]),
}
WORDS = {"not_entailment": "no", "entailment": "yes"}        # QNLI's labels are words already


def rows(task, path):
    columns, texts, label, question, words = TASKS[task]
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\r\n").split("\t")
            if columns is None:
                columns = fields
                missing = [name for name in [*texts, label] if name not in columns]
                if missing:
                    sys.exit(f"error: {path}:1: no column {missing[0]!r}, expected {task}'s train.tsv or dev.tsv")
                continue
            if len(fields) != len(columns):
                sys.exit(f"error: {path}:{number}: {len(fields)} fields, expected {len(columns)}")
            row = dict(zip(columns, fields))
            word = words[int(row[label])] if row[label] in ("0", "1") else row[label]
            if word not in words:
                sys.exit(f"error: {path}:{number}: the label is {row[label]!r}, expected 0 or 1 ({words[0]}, {words[1]})")
            yield {"instruction": question, "input": "\n".join(row[name] for name in texts), "output": WORDS.get(word, word)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("file")
    arguments = parser.parse_args()
    for row in rows(arguments.task, arguments.file):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
