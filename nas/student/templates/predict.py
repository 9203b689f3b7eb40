"""Run this student, or prove it on this machine. Needs numpy and onnxruntime, nothing else.

python predict.py --selftest          prove that the model computes here what it computed where it was made
python predict.py INPUT.npy           classify an array of raw inputs: one sample, or a batch of them
python predict.py INPUT.txt           classify texts, one a line (a student of texts)
python predict.py --benchmark         milliseconds of one inference on this machine
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

# Plain on purpose: this file is copied into every student folder and must run anywhere.
HERE = Path(__file__).resolve().parent


def load(threads=1):
    """An onnxruntime session of model.onnx."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(HERE / "model.onnx"), options, providers=["CPUExecutionProvider"])


def logits(session, x):
    """Logits [n, classes] of raw inputs [n, ...] in any numeric type."""
    wanted = session.get_inputs()[0]
    kind = np.int64 if wanted.type == "tensor(int64)" else np.float32
    return session.run(None, {wanted.name: np.ascontiguousarray(x, dtype=kind)})[0]


def tokens(texts):
    """Numbers of tokens [n, length] of texts, as in training."""
    if (HERE / "tokenizer.json").exists():
        from tokenizers import Tokenizer  # of a tokenizer that was brought along: pip install tokenizers

        tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
        return np.array([one.ids for one in tokenizer.encode_batch(texts)], dtype=np.int64)
    if not (HERE / "vocabulary.json").exists():
        sys.exit("this student reads no texts; give a .npy file of raw inputs")
    vocabulary = json.loads((HERE / "vocabulary.json").read_text(encoding="utf-8"))
    numbers = {word: i for i, word in enumerate(vocabulary["tokens"])}
    x = np.zeros((len(texts), vocabulary["length"]), dtype=np.int64)  # 0 is padding, 1 is what is unknown
    for row, text in zip(x, texts, strict=True):
        words = re.findall(vocabulary["pattern"], text.lower() if vocabulary["lower"] else text)
        found = [numbers.get(word, 1) for word in words[: len(row)]] or [1]
        row[: len(found)] = found
    return x


def read(path):
    """Raw inputs of a file: an array, or texts."""
    if path.lower().endswith(".txt"):
        with open(path, encoding="utf-8") as file:
            return tokens([line.rstrip("\n") for line in file])
    x = np.load(path, allow_pickle=False)
    spec = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))["input"]
    low, high = spec["range"]
    if spec["dtype"] == "int64" and (x.dtype.kind not in "iu" or (x.size and (x.min() < low or x.max() > high))):
        sys.exit(f"{path} has values of {x.dtype}; expected numbers of tokens, whole, {low:g}..{high:g}")
    return x


def recorded():
    """Inputs and logits that were written when the student was made."""
    with np.load(HERE / "selftest.npz", allow_pickle=False) as file:
        return dict(file)


def selftest(session):
    """Compare with the logits that were recorded when the student was made."""
    proof = recorded()
    found = logits(session, proof["x"])
    agreement = float((found.argmax(1) == proof["logits"].argmax(1)).mean())
    difference = float(np.abs(found - proof["logits"]).max())
    passed = agreement >= float(proof["min_agreement"])
    print(
        f"selftest {'passed' if passed else 'FAILED'}: {len(found)} samples, agreement {agreement:.4f}, "
        f"largest difference of a logit {difference:.2e}"
    )
    return 0 if passed else 1


def benchmark(session):
    """Median and 95th percentile over a second of single inferences."""
    x = recorded()["x"][:1]
    times, end = [], time.perf_counter() + 1.0
    while time.perf_counter() < end:
        start = time.perf_counter()
        logits(session, x)
        times.append((time.perf_counter() - start) * 1e3)
    print(f"p50 {np.percentile(times, 50):.4f} ms, p95 {np.percentile(times, 95):.4f} ms, {len(times)} runs")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", help="a .npy file of raw inputs, or a .txt file of texts")
    parser.add_argument("--selftest", action="store_true")
    parser.add_argument("--benchmark", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    session = load(options.threads)
    if options.selftest:
        return selftest(session)
    if options.benchmark:
        return benchmark(session)
    if not options.input:
        parser.error("give an input file, --selftest or --benchmark")
    shape = session.get_inputs()[0].shape[1:]
    x = read(options.input)
    x = x.reshape(-1, *shape) if x.size and x.size % int(np.prod(shape)) == 0 else x
    if list(x.shape[1:]) != list(shape):
        sys.exit(f"{options.input} has shape {x.shape}; expected one or more samples of shape {tuple(shape)}")
    classes = json.loads((HERE / "manifest.json").read_text())["task"]["classes"]
    scores = logits(session, x)
    scores = np.exp(scores - scores.max(1, keepdims=True))
    for i, row in enumerate(scores / scores.sum(1, keepdims=True)):
        print(f"{i}: {classes[row.argmax()]} ({100 * row.max():.1f} %)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
