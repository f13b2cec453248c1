"""Does this program read what Python's json, safetensors and sentencepiece refuse? It must not.

    python dev/differential.py [N [READER]]   (N mutated inputs a reader, 20000; needs gcc, pip install safetensors sentencepiece)

Mutated headers, objects, files of rows and tokenizers go to both. One that is read here and refused there ends this with
status 1, and so does a tokenizer that gives other ids. Those that are read there and refused here are counted by the reason
that is given here.
"""
import collections, gzip, json, os, random, re, struct, subprocess, sys, zlib
from safetensors import deserialize, SafetensorError
import sentencepiece

READERS = ["safetensors", "jsonl", "gz", "object", "tokenizer"]        # as dev/fuzz.c calls them
WORDS = [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"\r", b"\t", b"\0", b"\x7f", b"\xff", b"\xc3",
         b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xc2\xa0", b"-", b"+", b".", b"0", b"00", b"-0", b"-0.0", b"1e3", b"8.0", b"1E-5",
         b"e", b".5", b"1.", b"01", b"0x1", b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"1" * 40,
         b"1" * 400, b"1e400", b"NaN", b"Infinity", b"-Infinity", b"nan", b"null", b"true", b"false", b"True", b"\\u0000",
         b"\\ud83d", b"\\ude00", b"\\ud83d\\ude00", b"\\x41", b"\\u12", b"\\u00e9", b"\\/", b"//", b"/**/", b"'", b'"a":1,',
         b'"a":1', b'"shape":[],', b'"dtype":"F32",', b'"data_offsets":[0,0],', b'"more":[[]],', b'"more":-1,',
         b'"__metadata__":{"a":"b"},', b'"__metadata__":null,', b"[" * 130 + b"]" * 130, b'"I64"', b'"U8"',
         b'"F4"', b'"BOOL"', b"[0,8]", b"[0,8,8]", b"[]"]
OBJECTS = [b'{"hidden_size": 128, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie": true, "a": ["x", {"y": [1, 2.50, -3E+2]}]}',
           b'{"text": "a\\n\\t\\"b\\" \\u00e9\\ud83d\\ude00 \xc3\xa9 \xe2\x82\xac", '
           b'"n": 1000000000000000019884624838656, "": {}, "z": []}',
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


# What dev/fuzz.c encodes with every tokenizer that is read.
TEXTS = [t.encode() if isinstance(t, str) else t for t in
         ["Hello world", " a  b ", "\u00e9\u20ac\U0001f600\n\t", "<s></s><unk>abab", b"\xe2\x96\x81a\xff", "  "]]


def varint(n):
    n, out = n % 2**64, b""
    while n > 127: out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


# A message of protobuf: a list of [key, value], key = number * 8 + wire type, and value bytes, a number or a message.
def protobuf(rng, message):
    out = b""
    for key, value in message:
        out += varint(key) if rng.random() < 0.9999 else \
            varint(key)[:-1] + bytes([varint(key)[-1] | 128]) + bytes(rng.randint(1, 6))[:-1] + b"\0"
        if isinstance(value, list): value = protobuf(rng, value)
        if isinstance(value, int): out += varint(value)
        elif key & 7 == 2: out += varint(len(value)) + value
        else: out += value
    return out


NUMBERS = [0, 1, 2, 3, 4, 5, 6, 7, 100, 258, 259, -1, 2**31, 2**32 + 1, 2**63]
PIECES = ["\u2581a", "ab", "he", "ll", "\u2581he", "\u2581", "\u2581\u2581", "a", "b", "h", "e", "l", "o", "w", "r", "d", "<",
          ">", "aba", "\u00e9", "\u20ac", "\U0001f600", "\n", " ", "a\u2581b", "<0x4g>", "\ufffd", "Hello", " a", "\t"]
TAKEN = ["<s>", "</s>", "<unk>", "<0x41>"]


def piece(text, score, kind):
    return [10, [[10, text.encode()], [21, struct.pack("<f", score)]] + ([[24, kind]] if kind != 1 else [])]


def mutate_message(rng, message, depth=0):
    kind = rng.randint(0, 9)
    i = rng.randrange(len(message)) if message else 0
    if depth == 0 and rng.random() < 0.4:
        i = rng.choice([0, 1, 2] + [i for i, f in enumerate(message) if f[0] != 10] + list(range(259, len(message))))
    if not message or kind == 0:
        message.insert(i, [rng.choice([16, 24, 32, 40, 280, 328, 336, 13,
                                       8 * rng.randint(0, 60) + rng.choice([0, 0, 2, 5, 3])], ), rng.choice(NUMBERS)])
    elif kind == 1: del message[i]
    elif kind == 2: message.insert(rng.randint(0, len(message)), message[i])
    elif kind == 3: message[i] = message[rng.randrange(len(message))]
    elif isinstance(message[i][1], list): mutate_message(rng, message[i][1], depth + 1)
    elif isinstance(message[i][1], int): message[i][1] = rng.choice(NUMBERS)
    elif len(message[i][1]) == 4 and kind < 8:
        message[i][1] = struct.pack("<f", rng.choice([0, -1, 1, 5, float("inf"), float("-inf"), float("nan"), -1e30, 1e-40]))
    elif kind < 8: message[i][1] = rng.choice(PIECES + TAKEN).encode()
    else: message[i][1] = mutate(rng, message[i][1])
    for field in message:                                           # a number stands where one is read, bytes elsewhere
        if field[0] & 7 == 0 and not isinstance(field[1], int): field[1] = rng.choice(NUMBERS)
        if field[0] & 7 and isinstance(field[1], int): field[1] = bytes({5: 4, 1: 8}.get(field[0] & 7, 2))


def tokenizer(rng):
    own = rng.sample(PIECES, rng.randint(0, 14))
    pieces = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3)] + [piece(f"<0x{b:02X}>", 0, 6) for b in range(256)]
    pieces += [piece(p, float(-rng.randint(0, 9)), rng.choice([1, 1, 1, 1, 4, 5]) if i else 1) for i, p in enumerate(own)]
    message = pieces + [[18, [[24, 2], [280, 1]]],
                        [26, [[24, rng.randint(0, 1)], [32, rng.randint(0, 1)], [40, rng.randint(0, 1)]]]]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 6])): mutate_message(rng, message)
    return protobuf(rng, message)


def read_tokenizer(data):
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(data)
    return [processor.encode(text) for text in TEXTS]


# Whether the library reads it, or why not; of a tokenizer, its ids.
def read_there(reader, data):
    try:
        if reader == "tokenizer": return read_tokenizer(data)
        if reader == "safetensors": deserialize(data)
        elif reader == "object": loads(data.decode("utf-8"))
        else:
            if data[:2] == b"\x1f\x8b": data = gzip.decompress(data)
            text = data.decode("utf-8").removeprefix("\ufeff")
            if text.lstrip(" \t\r\n").startswith("["):
                for row in json.loads(text, object_pairs_hook=once):
                    if not isinstance(row, dict): raise ValueError("no object")
            else:
                for line in text.split("\n"):
                    if line.strip(" \t\r"): loads(line)
        return True
    except (SafetensorError, ValueError, RecursionError, RuntimeError, EOFError, gzip.BadGzipFile, zlib.error) as e:
        return str(e) or type(e).__name__


def generate(rng, reader):
    if reader == "tokenizer": return tokenizer(rng)
    if reader == "gz":
        packed = gzip.compress(mutate(rng, rng.choice(ROWS)), rng.randint(0, 9), mtime=0) + \
            rng.choice([b"", b"", gzip.compress(b"\n"), bytes(9)])
        return mutate(rng, packed) if rng.random() < 0.5 else packed
    if reader != "safetensors": return mutate(rng, rng.choice(OBJECTS if reader == "object" else ROWS))
    text, data = header(rng)
    text = mutate(rng, text)
    data = struct.pack("<Q", len(text)) + text + data
    return mutate(rng, data) if rng.random() < 0.1 else data


def shown(data):
    return repr(re.sub(rb"(\n\x0f\n\x06<0x..>\x15\0\0\0\0\x18\x06)+", b"...", data))[-400:]


def main():
    n, failed = int(sys.argv[1]) if len(sys.argv) > 1 else 20000, 0
    os.makedirs("build", exist_ok=True)
    subprocess.run(["make", "-s", "build/corpus"], check=True)
    for reader in sys.argv[2:] or READERS:
        rng = random.Random(reader)
        here = subprocess.Popen(["build/corpus", reader], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        counts, reasons, examples = collections.Counter(), collections.Counter(), {}
        for _ in range(n):
            data = generate(rng, reader)
            here.stdin.write(struct.pack("<I", len(data)) + data)
            here.stdin.flush()
            verdict, there = here.stdout.readline().decode(), read_there(reader, data)
            assert verdict[:1] in ("Y", "N"), (reader, data)
            read = verdict[0] == "Y"
            said = "" if read else here.stderr.readline().decode()
            read_too = not isinstance(there, str)
            counts[read, read_too] += 1
            if read and not read_too:
                print(f"{reader}: read here, refused there, {there}: {shown(data)}")
                failed = 1
            if read and isinstance(there, list) and json.loads(verdict[1:]) != there:
                print(f"{reader}: ids {verdict[1:].strip()} here, {there} there: {shown(data)}")
                failed = 1
            if not read and read_too:
                reason = re.sub(r".*of the line: |^error: \S*?(, row \d+)?: | near '.*", "", said.strip())
                reason = re.sub(r'tensor \S* |"[^"]*"|[0-9]+', "…", reason)[:90]
                reasons[reason] += 1
                examples.setdefault(reason, data)
        here.stdin.close()
        here.wait()
        print(f"{reader}: {n} inputs; read by both {counts[True, True]}, refused by both {counts[False, False]}, "
              f"read here alone {counts[True, False]}, read there alone {counts[False, True]}:")
        for reason, times in reasons.most_common(): print(f"    {times:6d}  {reason}    e.g. {shown(examples[reason])}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
