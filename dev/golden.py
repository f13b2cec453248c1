"""Makes the files under dev/golden/ that `make test` holds the program to, with numpy, PyTorch and transformers.

    python3 dev/golden.py --stories DIR     (a Hugging Face Llama directory, for the greedy text)

singular_values.json   LAPACK's leading singular values of matrices that test_all.c makes by the same formula
stories260K.txt        256 greedy tokens after "Once upon a time", decoded by SentencePiece
"""
import argparse
import json
import os

import numpy

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")


def singular_values():
    values = {}
    for rows, columns, rank in ((40, 30, 6), (24, 64, 24), (9, 9, 9), (120, 50, 16)):
        i, j = numpy.mgrid[0:rows, 0:columns].astype(numpy.float64)
        matrix = numpy.sin(1 + 0.7 * i * i + 1.3 * j) + 2 * (i == j)
        values[f"{rows}x{columns}"] = numpy.linalg.svd(matrix, compute_uv=False)[:rank].tolist()
    with open(os.path.join(HERE, "singular_values.json"), "w") as file:
        json.dump(values, file)


def greedy_text(directory):
    import sentencepiece
    import torch
    import transformers
    tokenizer = sentencepiece.SentencePieceProcessor(os.path.join(directory, "tokenizer.model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = [tokenizer.bos_id()] + tokenizer.encode("Once upon a time")
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=256)[0].tolist()
    with open(os.path.join(HERE, "stories260K.txt"), "w") as file:
        file.write(tokenizer.decode([i for i in ids if i not in (1, 2)]) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", metavar="DIR")
    os.makedirs(HERE, exist_ok=True)
    arguments = parser.parse_args()
    singular_values()
    if arguments.stories:
        greedy_text(arguments.stories)
