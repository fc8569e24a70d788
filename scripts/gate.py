"""Check that a refactoring changes no byte of any output, by running the same conversions before and after it.

    python scripts/gate.py record FILE.json      run all conversions and record digests of their outputs
    python scripts/gate.py compare FILE.json     run them again; print each output that differs, and exit with 1 if any does

It makes tiny seeded models of every family and uses only the documented command lines of the package, so that modules may
move. Run both in the same Python environment and with the same working folder, whose path is part of the outputs. The outputs
of the last run stay there for inspection.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = Path("/tmp/megatron-converters-gate")
MANIFEST = "conversion.json"
#: Fields of a tensor in a manifest that are compared besides its checksum. The rest of a manifest is not compared.
FIELDS = ("holds", "from", "at", "dtype", "cast from", "transposed", "padding rows")
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}

#: Command lines, by the words for them in the table below. Those without {output} print their result.
COMMANDS = {
    "convert": "-m megatron_converters convert {source} {output}",
    "queue": "convert.py --load-dir {source} --save-dir {output}",
    "back": "convert_mlm_to_hf_checkpoint.py --load-path {source} --save-path {output}",
    "args": "-m megatron_converters args {source}",
    "inspect": "-m megatron_converters inspect --json {source}",
}

#: Chains, one on each line: a model, then commands that each read the output of the one before. " / " separates alternatives;
#: {work} and {source} are the working folder and the folder that is read. A beginning that chains share runs once.
CHAINS = """
llama2 / mistral / qwen2 / qwen3 > convert --tp 2 --pp 2 > back --max-shard-size 300KB
llama3 / llama3.1 / llama3.2-tied / llama-bias > convert --tp 4 --saver-transformer-impl local > convert --max-shard-size 200KB
llama-head_dim / llama-linear / mistral-window / qwen2-tied / qwen3-tied > convert --tp 2 --saver-transformer-impl local > back
mixtral-window > convert --tp 2 > back
llama3.2-tied / qwen3 > convert --tp 2 --ckpt-format torch_dist > back
llama-bias / mistral-window > convert --tp 2 --pp 2 --ckpt-format torch_dist --saver-transformer-impl local > back

llama2 > convert --tp 2 --pp 2 --decoder-first-pipeline-num-layers 3 > inspect
qwen2 > convert --pp 2 --decoder-last-pipeline-num-layers 3 > back
llama3.2-tied > convert --pp 3 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split > back / args
llama3.1 > convert --tp 2 --pp 2 --target-num-virtual-stages-per-pipeline-rank 2 > back / args / inspect
mixtral > convert --pp 2 --ep 2 --target-num-layers-per-virtual-pipeline-stage 1 > back
llama2 > convert --pp 2 --pipeline-model-parallel-layout 'Et|t|t|tL' > back / args
qwen3-moe > convert --pp 2 --ckpt-format torch_dist --pipeline-model-parallel-layout 'E|ttt|t|L'

mixtral / qwen2-moe / qwen3-moe > convert --tp 2 --pp 2 --ep 2 > back --expert-layout fused --max-shard-size 500KB
qwen2-moe / qwen3-moe-dense-layers > convert --tp 2 --ep 4 --etp 1 > back / args / inspect
mixtral > convert --tp 4 --ep 2 --etp 2 --expert-layout stacked > back --max-shard-size 1MB
mixtral / qwen2-moe > convert --tp 2 --ep 2 --expert-layout dynamic --saver-transformer-impl local > back
qwen3-moe-sparse-step / mixtral-fused > convert --tp 2 --ep 2 --saver-transformer-impl local > back
qwen2-moe-dense-layer > convert --tp 2 --expert-layout sequential > convert --max-shard-size 400KB
mixtral / qwen3-moe-dense-layers > convert --tp 2 --ep 2 --ckpt-format torch_dist > back
qwen2-moe > convert --ep 2 --ckpt-format torch_dist --saver-transformer-impl local > back --expert-layout fused
qwen3-moe > convert --tp 2 --etp 1 --ckpt-format torch_dist --expert-layout stacked > back
olmoe > convert --allow-inexpressible --tp 2 --pp 2 --ep 2 > back / args --allow-inexpressible / inspect
olmoe > convert --allow-inexpressible --tp 2 --ckpt-format torch_dist > back --expert-layout fused
olmoe > queue --loader hf --saver mcore --allow-inexpressible --tp 2 --saver-transformer-impl local
mixtral-bins > convert --tp 2 --ep 2 --saver-transformer-impl local --load-capacity-bins > back --save-capacity-bins / convert

llama2 / qwen2-moe > convert --tp 2 --pp 2 --dtype bf16 > back --target-params-dtype fp32
mixtral > convert --ep 2 --dtype bf16 --ckpt-format torch_dist > convert --dtype fp16
llama3-bf16 > convert --tp 2 --dtype fp16 > back --target-params-dtype bf16
qwen3-moe-bf16 > convert --tp 2 --ep 2 > back / inspect

llama2 / qwen2 > convert --tp 2 --pp 2 > convert --tp 4 --pp 1
qwen2-tied > convert --tp 2 --saver-transformer-impl local > convert --tp 1 --pp 2 --ckpt-format torch_dist
llama3.2-tied > convert --tp 2 --ckpt-format torch_dist > convert --tp 4 --pp 2 > back
mixtral > convert --tp 2 --pp 2 --ep 2 > convert --tp 1 --ep 4 --expert-layout sequential --saver-transformer-impl local
qwen2-moe > convert --tp 2 --ep 4 --etp 1 > convert --tp 4 --ep 2 --etp 2 --dtype bf16
qwen3-moe-dense-layers > convert --tp 2 --ep 2 --ckpt-format torch_dist > convert --tp 1 --ep 1 --ckpt-format torch_dist

mistral > queue --loader llama_mistral --saver mcore --tp 2 --pp 2 > queue --loader core --saver hf
llama3.1 > queue --loader llama_mistral --saver mcore --bf16 --tp 2 --release > queue --loader core --saver mcore --pp 4
qwen2 > queue --loader llama_mistral --saver mcore --ckpt-format torch_dist --tp 2 > queue --loader core --saver mcore --tp 1
mixtral / qwen3-moe > queue --loader mixtral_hf --saver mcore --tp 2 --ep 2 > queue --loader core --saver hf
qwen2-moe > queue --loader mixtral_hf --saver mcore --ep 2 --ckpt-format torch_dist > queue --loader core --saver mcore --ep 4
qwen3 > queue --loader hf --saver mcore --tp 2 --saver-transformer-impl local > queue --loader core --saver hf --max-shard-size 1MB

meta-1 / meta-2 > convert --tp 2 > back --max-shard-size 200KB
meta-2 > queue --loader llama_mistral --saver mcore --checkpoint-type meta --pp 2
meta-2 > convert --to hf / inspect
llama2-bin > convert --tp 2 --make-vocab-size-divisible-by 8 > convert
llama2-tokenizer > convert --tp 2 --pp 2 > args / back --hf-config {work}/llama3
llama2-tokenizer > convert --tp 2 --pp 2 > back > convert --source-margs-file {source}/source_megatron_args.json
llama2 > queue --loader llama_mistral --saver mcore --tokenizer-model {work}/llama2-tokenizer > back
llama3-tiktoken > convert --tp 2 --pp 2 > back --instruct --source-model-type llama3.1
llama2 > convert --tp 2 --pp 4 --workers 2
llama3 > convert --to hf --max-shard-size 300KB --dtype fp32
mixtral-fused > convert --to hf
qwen3-moe > convert --to hf --expert-layout fused
llama3.1 / mistral-window / qwen2-tied / mixtral / qwen2-moe / qwen3-moe > args --json
"""

#: Buffers of Habana's routers, all of the same length here.
BINS = (
    "bins_usage total_requested_capacity optimize_moe_bins_usage_last optimize_moe_total_requested_capacity_last "
    "capacity_bins"
).split()

#: Models that are variants of a family in tests/oracle/hf.py: the family, and options of `make_model`.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-linear": ("llama2", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "llama2-bin": ("llama2", dict(weights="bin", legacy_config=True, max_shard_size="200KB")),
    "llama2-tokenizer": ("llama2", {}),
    "llama3-bf16": ("llama3", dict(dtype="bfloat16", max_shard_size="100KB")),
    "llama3-tiktoken": ("llama3.1", dict(vocab_size=600)),
    "mixtral-bins": ("mixtral", {}),
    "mixtral-fused": ("mixtral", dict(fused_experts=True)),
    "mixtral-window": ("mixtral", dict(sliding_window=7)),
    "qwen2-moe-dense-layer": ("qwen2-moe", dict(mlp_only_layers=[1])),
    "qwen3-moe-bf16": ("qwen3-moe", dict(dtype="bfloat16", legacy_config=True)),
}

#: Digests of each output, by its chain: those of its files by name, and of its tensors by "file: tensor".
Digests = dict[str, dict[str, str]]


def add_tokenizer(folder: Path) -> None:
    """Add a tokenizer of single letters, saved by transformers."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *map(chr, range(97, 123))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def add_tiktoken(folder: Path) -> None:
    """Add a `tokenizer.model` like Llama 3's: all bytes and a few pairs; readers add 256 special tokens."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"e" + bytes([byte]) for byte in range(97, 123)]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def add_bins(folder: Path) -> None:
    """Add capacity bins for TP2 and EP2: by name, layer, pipeline, expert and tensor rank, as Habana's converter saves them."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def ranks() -> dict[int, Any]:
        return {ep: {tp: torch.randint(2**40, (5,), generator=generator) for tp in range(2)} for ep in range(2)}

    bins = {name: {layer: {0: ranks()} for layer in range(4)} for name in BINS}
    torch.save(bins, folder / "capacity_bins.pt")


def write_meta(folder: Path, files: int, embedding_axis: int) -> None:
    """Write a Llama in Meta's format, cut over `files`; Llama 3 cuts the embedding by rows, earlier ones by columns."""
    import torch

    sizes = dict(dim=64, n_layers=4, n_heads=8, n_kv_heads=4, norm_eps=1e-5, vocab_size=200, rope_theta=5e5)
    shapes = {"attention.wq": (64, 64, 0), "attention.wo": (64, 64, 1), "feed_forward.w2": (64, 112, 1)}
    shapes |= {f"attention.{name}": (32, 64, 0) for name in ("wk", "wv")}
    shapes |= {f"feed_forward.{name}": (112, 64, 0) for name in ("w1", "w3")}
    matrices = {f"layers.{n}.{name}": shape for n in range(4) for name, shape in shapes.items()}
    matrices |= {"tok_embeddings": (200, 64, embedding_axis), "output": (200, 64, 0)}
    norms = ["norm", *(f"layers.{n}.{name}_norm" for n in range(4) for name in ("attention", "ffn"))]
    generator = torch.Generator().manual_seed(0)
    cut = {
        name: torch.randn(rows, columns, generator=generator).chunk(files, axis)
        for name, (rows, columns, axis) in matrices.items()
    }
    whole = {f"{name}.weight": 1 + torch.rand(64, generator=generator) for name in norms}
    folder.mkdir()
    for number in range(files):
        parts = {f"{name}.weight": tensors[number].clone() for name, tensors in cut.items()}
        torch.save({**parts, **whole}, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(sizes))


#: Models in Meta's format (files, axis of the embedding's cut), and files that are added to models by transformers.
META: dict[str, tuple[int, int]] = {"meta-1": (1, 0), "meta-2": (2, 1)}
ADDED: dict[str, Callable[[Path], None]] = {
    "llama2-tokenizer": add_tokenizer,
    "llama3-tiktoken": add_tiktoken,
    "mixtral-bins": add_bins,
}


def make_model(name: str, folder: Path) -> None:
    """Write the model with the name that chains use."""
    from tests.oracle import hf

    if name in META:
        write_meta(folder, *META[name])
        return
    family, options = VARIANTS.get(name, (name, {}))
    hf.make_model(family, folder, **options)
    if name in ADDED:
        ADDED[name](folder)


def levels() -> list[list[str]]:
    """Beginnings of all chains, each once, by length: first the models, then the commands that read these, and so on."""
    found: defaultdict[int, dict[str, None]] = defaultdict(dict)
    for line in filter(None, CHAINS.splitlines()):
        for chain in product(*(part.split(" / ") for part in line.split(" > "))):
            for depth, beginning in enumerate(accumulate(chain, "{} > {}".format)):
                found[depth][beginning] = None
    return [list(level) for level in found.values()]


def folder_of(chain: str, work: Path) -> Path:
    """Folder of a chain's output. Its name is derived from the chain, since it appears in files that are compared."""
    return work / re.sub(r"(?:[^\w.-]|--)+", "_", chain).strip("_")


def execute(chain: str, work: Path) -> None:
    """Run the last command of a chain; if it fails, exit with its message."""
    before, _, last = chain.rpartition(" > ")
    word, _, options = last.partition(" ")
    output = folder_of(chain, work)
    places = dict(source=folder_of(before, work), output=output, work=work)
    command = [part.format(**places) for part in [*COMMANDS[word].split(), *shlex.split(options)]]
    run = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )
    if run.returncode:
        sys.exit(f"{shlex.join(['python', *command])} failed with exit code {run.returncode}:\n{run.stderr}")
    if "{output}" not in COMMANDS[word]:
        output.mkdir()
        (output / "stdout").write_text(comparable(word, run.stdout))


def comparable(word: str, text: str) -> str:
    """Output of a command without what may change: `inspect` describes the model in the words of the spec.

    Norms before experts were once a slot of their own, `moe_norm`.
    """
    if word != "inspect":
        return text.replace("moe_norm", "mlp_norm")
    content = json.loads(text, object_pairs_hook=merged_norms)
    return json.dumps({key: value for key, value in content.items() if key != "model"})


def merged_norms(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object in which the bytes of both kinds of norms before an MLP are one number."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        name = "mlp_norm" if key == "moe_norm" else key
        found[name] = found[name] + value if name in found else value
    return found


def digest(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder, by path, and of all tensors in its manifests."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name == MANIFEST:
            found[name] = "a manifest"
            found |= manifest_digests(path, name.removesuffix(MANIFEST))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def manifest_digests(path: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """Checksum of each tensor in a manifest, with a digest of its other fields."""
    for file, content in json.loads(path.read_text())["files"].items():
        for tensor, entry in content["tensors"].items():
            rest = json.dumps({field: entry.get(field) for field in FIELDS}, sort_keys=True).replace(
                "moe_norm", "mlp_norm"
            )
            yield f"{prefix}{file}: {tensor}", f"{entry['crc32']} {hashlib.sha256(rest.encode()).hexdigest()[:16]}"


def run_all(work: Path, jobs: int) -> Digests:
    """Make all models, run all commands, and return the digests of their outputs."""
    start = time.monotonic()
    models, *commands = levels()
    chains = [chain for level in (models, *commands) for chain in level]
    if len({folder_of(chain, work) for chain in chains}) < len(chains):
        sys.exit("two chains would be written to one folder")
    sys.path.insert(0, str(ROOT))
    os.environ.update(ENVIRONMENT)
    for name in models:
        make_model(name, folder_of(name, work))
    with ThreadPoolExecutor(jobs) as pool:
        for level in commands:
            list(pool.map(lambda chain: execute(chain, work), level))
    found = {chain: digest(folder_of(chain, work)) for chain in chains}
    print(
        f"{len(models)} models, {len(chains) - len(models)} commands, {sum(map(len, found.values()))} files and tensors "
        f"in {time.monotonic() - start:.0f} s"
    )
    return found


def differences(old: dict[str, str], new: dict[str, str]) -> Iterator[str]:
    """Lines for each file and tensor of one output that differs."""
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"{name}: is gone"
        elif name not in old:
            yield f"{name}: is new"
        elif old[name] != new[name]:
            same_bytes = ": " in name and old[name].split()[0] == new[name].split()[0]
            yield f"{name}: " + ("has the same bytes, from or at another place" if same_bytes else "differs")


def compare(old: Digests, new: Digests) -> int:
    """Print the outputs that differ; returns their number."""
    count = 0
    for chain in dict.fromkeys([*old, *new]):
        lines = list(differences(old.get(chain, {}), new.get(chain, {})))
        if lines:
            print(f"\n{chain}", *lines, sep="\n    ")
        count += bool(lines)
    return count


@contextmanager
def emptied(work: Path) -> Iterator[None]:
    """Empty a folder and lock it; waits while another run holds it. A folder that this script did not make is left alone."""
    lock = Path(f"{work}.lock")
    if work.exists() and any(work.iterdir()) and not lock.exists():
        sys.exit(f"{work} holds something else; name an empty folder")
    work.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield


def main() -> None:
    """Record the outputs of all conversions, or compare them with a record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help=f"{WORK} by default; emptied first")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="commands that run at a time; 2 by default")
    args = parser.parse_args()
    work = args.work.resolve()
    before = json.loads(args.file.read_text()) if args.action == "compare" else None
    if before and before["work"] != str(work):
        parser.error(f"{args.file} was recorded in {before['work']}, not in {work}; name that folder by --work")
    with emptied(work):
        found = run_all(work, args.jobs)
    if before is None:
        args.file.write_text(json.dumps({"work": str(work), "outputs": found}, indent=1))
        return
    count = compare(before["outputs"], found)
    print(f"\n{count} of {len(found)} outputs differ" if count else "no difference")
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
