"""Rows of `bench.py`: which commands are run on which models, and with which partners."""

from __future__ import annotations

from collections.abc import Iterator

from inputs import Model
from pairs import Row, Run

#: 1.1 and 4.1 billion parameters in bf16; a mixture of 36,945 tensors, most of them of 64 KiB; and one for start-up.
LLAMA = Model("llama_2gb", "16 2048 0", "8 512 0")
LARGE = Model("llama_8gb", "16 4096 0", "8 512 0")
MANY = Model("many_tensors", "94 256 128 --ffn 128", "2 256 8 --ffn 128")
TINY = Model("llama_tiny", "2 128 0", "2 128 0")
#: DeepSeek-V3's shapes in FP8: 2.2 billion parameters, and files of 24 GB of which there are the headers alone.
FP8 = Model("fp8", "2 32", "2 2 --hidden 896", "make_fp8")
FP8_HEADERS = Model("fp8_headers", "9 64 --sparse", "2 2 --hidden 896 --sparse", "make_fp8")

#: Titles of the tables by section.
TITLES = {
    "copies": "Copies, 2.2 GB",
    "copies-8gb": "Copies, 8.2 GB",
    "casts": "Casts of a model of 1.1 billion parameters, beside a run without a cast that writes the same bytes",
    "many": "Many tensors: 36,945 of a mixture of experts, 2.4 GB",
    "start-up": "Start-up",
    "fp8-sources": "FP8 with DeepSeek-V3's shapes: 2.2 GB, 4.5 GB of bf16 once decoded, on one core; and the plan for 24 GB",
    "by-hand": "By hand: transformers' `from_pretrained`, then `torch.save` of joined and cut tensors, beside our conversion",
}


def _copies(section: str, model: Model, suffix: str = "") -> Iterator[Row]:
    """Rows of both directions in both formats of Megatron-LM, those that read the same next to each other."""
    for name, label, command in (
        ("forward", "HF to Megatron", "convert {hf} {output} --tp 2 --pp 2"),
        ("forward-dist", "HF to torch_dist", "convert {hf} {output} --tp 2 --pp 2 --ckpt-format torch_dist"),
        ("back", "Megatron to HF", "convert {megatron} {output}"),
        ("back-dist", "torch_dist to HF", "convert {torch_dist} {output}"),
    ):
        yield Row(name + suffix, section, model, Run(label, command))


def _other_ways() -> Iterator[Row]:
    """Rows of other sizes, of several workers, and of the command lines that other projects specify."""
    for name, label, command in (
        ("forward-tp8-pp8", "HF to Megatron, TP 8, PP 8", "convert {hf} {output} --tp 8 --pp 8"),
        ("forward-workers", "HF to Megatron, 2 workers", "convert {hf} {output} --tp 2 --pp 2 --workers 2"),
        (
            "forward-convert.py",
            "HF to Megatron, `convert.py`",
            "convert.py --loader hf --saver mcore --load-dir {hf} --save-dir {output} --tp 2 --pp 2",
        ),
        ("back-tp8-pp8", "Megatron, TP 8, PP 8, to HF", "convert {megatron_tp8_pp8} {output}"),
        ("back-workers", "Megatron to HF, 2 workers", "convert {megatron} {output} --workers 2"),
        (
            "back-convert_mlm_to_hf",
            "Megatron to HF, `convert_mlm_to_hf_checkpoint.py`",
            "convert_mlm_to_hf --load-path {megatron} --save-path {output}",
        ),
    ):
        yield Row(name, "copies", LLAMA, Run(label, command))


def _casts() -> Iterator[Row]:
    """Rows of casts; the partner reads the model in the type that the cast writes."""
    stored = {"bf16": "{hf}", "fp16": "{hf_fp16}", "fp32": "{hf_fp32}"}
    forward = "convert {source} {{output}} --tp 2 --pp 2"
    for source, written in (("bf16", "fp32"), ("bf16", "fp16"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp16", "fp32")):
        cast = Run(
            f"HF to Megatron, {source} to {written}",
            f"{forward.format(source=stored[source])} --dtype {written}",
        )
        copy = Run(f"HF to Megatron, {written}", forward.format(source=stored[written]))
        yield Row(f"{source}-{written}", "casts", LLAMA, cast, copy)
    cast = Run("Megatron to HF, bf16 to fp32", "convert {megatron} {output} --dtype fp32")
    copy = Run("Megatron to HF, fp32", "convert {megatron_fp32} {output}")
    yield Row("back-bf16-fp32", "casts", LLAMA, cast, copy)


_PASS = Run("`python -c pass`", "python -c pass")
_NUMPY = Run("`python -c 'import numpy'`", "python -c 'import numpy'")


def _many() -> Iterator[Row]:
    """Rows of the mixture with many tensors."""
    both = Run("`cat` of both", "sh -c 'find {hf} {megatron_tp2_ep8} -type f | xargs cat > /dev/null'")
    for name, label, command, partner in (
        ("forward", "HF to Megatron, TP 2, EP 8", "convert {hf} {output} --tp 2 --ep 8", None),
        ("inspect-hf", "`inspect` HF", "megatron-converters inspect {hf}", _NUMPY),
        ("back", "Megatron, TP 2, EP 8, to HF", "convert {megatron_tp2_ep8} {output}", None),
        ("inspect", "`inspect` Megatron", "megatron-converters inspect {megatron_tp2_ep8}", _NUMPY),
        ("verify", "`verify` HF, Megatron", "megatron-converters verify {hf} {megatron_tp2_ep8}", both),
        ("diff", "`diff` HF, Megatron", "megatron-converters diff {hf} {megatron_tp2_ep8}", both),
    ):
        yield Row(f"many-{name}", "many", MANY, Run(label, command), partner)


def _start_up() -> Iterator[Row]:
    """Rows of commands that have little to do, each beside a Python that has nothing to do or imports numpy alone."""
    plan = "megatron-converters plan {hf} {output} --tp 2 --pp 2"
    for name, model, run, partner in (
        ("numpy", TINY, _NUMPY, _PASS),
        ("help", TINY, Run("`--help`", "megatron-converters --help"), _PASS),
        ("convert", TINY, Run("`convert` of 17 MB", "convert {hf} {output} --tp 2 --pp 2"), _NUMPY),
        ("plan", LLAMA, Run("`plan --no-measure` of 2.2 GB", f"{plan} --no-measure"), _NUMPY),
        ("plan-measuring", LLAMA, Run("`plan` of 2.2 GB", plan), _NUMPY),
    ):
        yield Row(f"start-{name}", "start-up", model, run, partner)


def _by_hand() -> Iterator[Row]:
    """Rows of the conversion by hand, without and with a flush; ours always flushes."""
    ours = Run("ours", "convert {hf} {output} --tp 2 --pp 2")
    command, check = "by_hand convert {hf} {output}", "by_hand compare {output} {beside}"
    yield Row("by-hand-unflushed", "by-hand", LLAMA, Run("by hand", command), ours, check)
    yield Row("by-hand-flushed", "by-hand", LLAMA, Run("by hand, flushed", command, flushed=True), ours)


def _fp8() -> Iterator[Row]:
    """Rows of a model that is decoded, and of the plan for one of which there are headers alone."""
    convert = "{hf} {output} --tp 2 --pp 2"
    yield Row("fp8", "fp8-sources", FP8, Run("FP8 to Megatron, one core", f"convert-on-one-core {convert}"))
    plan = Run("`plan --no-measure` of 24 GB of FP8", "megatron-converters plan {hf} {output} --tp 8 --no-measure")
    yield Row("fp8-plan", "fp8-sources", FP8_HEADERS, plan, _NUMPY)


ROWS = (
    *_copies("copies", LLAMA),
    *_other_ways(),
    *_casts(),
    *_by_hand(),
    *_copies("copies-8gb", LARGE, "-8gb"),
    *_many(),
    *_start_up(),
    *_fp8(),
)
