"""Does this program read what Python's json and the safetensors library refuse? It must not.

    python dev/differential.py [N]          (N mutated inputs a kind, 20000; needs pip install safetensors, and gcc)

Mutated headers, objects and files of rows go to both. One that is read here and refused there ends this with status 1.
Those that are read there and refused here are counted by the reason that is given here.
"""
import collections, json, os, random, re, struct, subprocess, sys
from safetensors import deserialize, SafetensorError

KINDS = {"model.safetensors": 0, "rows.jsonl": 2, "object.json": 6}
WORDS = [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"\r", b"\t", b"\0", b"\x7f", b"\xff", b"\xc3", b"\xed\xa0\x80",
         b"\xef\xbb\xbf", b"\xc2\xa0", b"-", b"+", b".", b"0", b"00", b"-0", b"-0.0", b"1e3", b"8.0", b"1E-5", b"e", b".5", b"1.", b"01", b"0x1",
         b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"1" * 40, b"1" * 400, b"1e400", b"NaN", b"Infinity",
         b"-Infinity", b"nan", b"null", b"true", b"false", b"True", b"\\u0000", b"\\ud83d", b"\\ude00", b"\\ud83d\\ude00", b"\\x41", b"\\u12",
         b"\\u00e9", b"\\/", b"//", b"/**/", b"'", b'"a":1,', b'"a":1', b'"shape":[],', b'"dtype":"F32",', b'"data_offsets":[0,0],',
         b'"more":[[]],', b'"more":-1,', b'"__metadata__":{"a":"b"},', b'"__metadata__":null,', b"[" * 130 + b"]" * 130, b'"I64"', b'"U8"',
         b'"F4"', b'"BOOL"', b"[0,8]", b"[0,8,8]", b"[]"]
OBJECTS = [b'{"hidden_size": 128, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie": true, "a": ["x", {"y": [1, 2.50, -3E+2]}]}',
           b'{"text": "a\\n\\t\\"b\\" \\u00e9\\ud83d\\ude00 \xc3\xa9 \xe2\x82\xac", "n": 1000000000000000019884624838656, "": {}, "z": []}',
           b'\n{ "a" : 0 , "b" : -0.5 , "c" : false }\n']
ROWS = [b'{"question": "a", "answer": "b"}\n{"question": "c", "answer": 18.50}\n',
        b'[{"question": "a", "answer": "b"},\n {"text": "\\u0041 b c"}]\n',
        b'{"instruction": "a", "input": 12, "output": "b"}\r\n\n{"query": "a", "response": "b"}']


def header(rng):
    tensors, at = {}, 0
    for name in rng.sample(["a", "model.norm.weight", "b\u00e9", "lm_head.weight", "inv_freq"], rng.randint(0, 4)):
        dtype, size = rng.choice([("F32", 4), ("BF16", 2), ("F16", 2), ("I64", 8), ("F64", 8), ("U8", 1)])
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        end = at + size
        for n in shape:
            end = at + (end - at) * n
        tensors[name], at = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}, end
    if rng.random() < 0.5:
        tensors = {"__metadata__": {"format": "pt"}, **tensors}
    return json.dumps(tensors, ensure_ascii=rng.random() < 0.5).encode(), bytes(at)


def mutate(rng, text):
    text = bytearray(text)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 6])):
        at, kind = rng.randint(0, len(text)), rng.randint(0, 5)
        end = min(len(text), at + rng.choice([1, 1, 2, 4, 8, 20]))
        if kind == 0: text[at:at] = rng.choice(WORDS)
        elif kind == 1: text[at:end] = rng.choice(WORDS)
        elif kind == 2: del text[at:end]
        elif kind == 3: text[at:at] = text[at:end]
        elif kind == 4 and at < len(text): text[at] = rng.randrange(256)
        elif kind == 5:                         # a number becomes another
            numbers = list(re.finditer(rb"[0-9]+", text))
            if numbers:
                n = rng.choice(numbers)
                text[n.start():n.end()] = rng.choice([b"-0", b"8.0", b"1e1", b"-1", b"0", b"1", b"4", b"00", rng.choice(WORDS)])
    return bytes(text)


def once(pairs):
    if len(dict(pairs)) < len(pairs): raise ValueError("equal keys")
    return dict(pairs)


def loads(text):
    value = json.loads(text, object_pairs_hook=once)
    if not isinstance(value, dict): raise ValueError("no object")
    return value


def read_there(kind, data):
    try:
        if kind == "model.safetensors": deserialize(data)
        elif kind == "object.json": loads(data.decode("utf-8"))
        else:
            text = data.decode("utf-8").removeprefix("\ufeff")
            if text.lstrip(" \t\r\n").startswith("["):
                for row in json.loads(text, object_pairs_hook=once):
                    if not isinstance(row, dict): raise ValueError("no object")
            else:
                for line in text.split("\n"):
                    if line.strip(" \t\r"): loads(line)
        return True
    except (SafetensorError, ValueError, RecursionError):
        return False


def main():
    n, failed = int(sys.argv[1]) if len(sys.argv) > 1 else 20000, 0
    os.makedirs("build", exist_ok=True)
    for kind, target in KINDS.items():
        program, rng = f"build/verdicts_{target}", random.Random(target)
        subprocess.run(["gcc", "-std=gnu11", "-O1", "-w", "-fopenmp", "-DVERDICTS", f"-DTARGET={target}", "dev/fuzz.c", "ops/cpu.c", "tokenizer.c",
                        "-o", program, "-ljansson", "-lz", "-lpcre2-8", "-lutf8proc", "-lm"], check=True)
        here = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        counts, reasons, examples = collections.Counter(), collections.Counter(), {}
        for _ in range(n):
            if target == 0:
                text, data = header(rng)
                text = mutate(rng, text)
                data = struct.pack("<Q", len(text)) + text + data
                if rng.random() < 0.1: data = mutate(rng, data)
            else:
                data = mutate(rng, rng.choice(OBJECTS if target == 6 else ROWS))
            here.stdin.write(struct.pack("<I", len(data)) + data)
            here.stdin.flush()
            verdict, there = here.stdout.read(1), read_there(kind, data)
            said = here.stderr.readline().decode() if verdict == b"N" else ""
            assert verdict in (b"Y", b"N"), (kind, data)
            counts[verdict.decode(), there] += 1
            if verdict == b"Y" and not there:
                print(f"{kind}: read here, refused there: {data!r}")
                failed = 1
            if verdict == b"N" and there:
                reason = re.sub(r".*of the line: |^error: \S*?(, row \d+)?: | near '.*", "", said.strip())
                reason = re.sub(r'tensor \S* |"[^"]*"|[0-9]+', "…", reason)[:90]
                reasons[reason] += 1
                examples.setdefault(reason, data)
        here.stdin.close()
        here.wait()
        print(f"{kind}: {n} inputs; read by both {counts['Y', True]}, refused by both {counts['N', False]}, "
              f"read here alone {counts['Y', False]}, read there alone {counts['N', True]}:")
        for reason, times in reasons.most_common(): print(f"    {times:6d}  {reason}    e.g. {examples[reason][:150]!r}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
