"""All of the converters by numbers, on a tiny random model: `python examples/example_tensor_parallel.py [DIR]`.

It makes the model itself and needs torch. Everything is written into DIR, by default a temporary folder that is removed at the end.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path

import torch

from megatron_converters import (
    SmartConverter,
    TensorParallelConverter,
    convert_llama_7b,
    convert_minicpm_8b,
    smart_convert_hf_to_megatron,
    smart_convert_megatron_to_hf,
    verify,
)

LAYERS, HIDDEN, MLP, QUERY_HEADS, KV_HEADS, VOCABULARY = 4, 64, 96, 32, 8, 199
HEAD = HIDDEN // QUERY_HEADS


def make_model(folder: Path) -> Path:
    """Write a random model as a Hugging Face folder: config.json and pytorch_model.bin."""
    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes |= {"model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}mlp.gate_proj.weight": (MLP, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (MLP, HIDDEN),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, MLP),
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def without_args(checkpoint: Path) -> None:
    """Leave nothing but weights in the rank files, as some training code saves them."""
    from megatron_converters.storage import torch_zip
    from megatron_converters.storage.tensor import as_torch

    for path in checkpoint.glob("mp_rank_*/model_optim_rng.pt"):
        held = torch_zip.read(path)["model"]
        tensors = {name: as_torch(data).clone() for name, data in held.items() if data is not None}
        torch.save({"model": tensors}, path)


def same(path: Path, model: Path) -> bool:
    """Whether a file holds the model's tensors, bit for bit."""
    ours, theirs = torch.load(path), torch.load(model / "pytorch_model.bin")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def run(work: Path) -> None:
    """Go through everything."""
    model = make_model(work / "hf")

    print("== Hugging Face to Megatron-LM, tp=2 and pp=2")
    checkpoint = smart_convert_hf_to_megatron(model, work / "megatron", tp_size=2, pp_size=2).path
    print(*sorted(path.name for path in checkpoint.glob("mp_rank_*")))

    print("== and back, with args: nothing has to be said")
    back = smart_convert_megatron_to_hf(work / "megatron", work / "out" / "smart.pt")
    print(same(back.path, model), bool(verify(back.path)))

    print("== without args: what is detected")
    without_args(checkpoint)
    smart = SmartConverter()
    print(smart.detect_parallel_config(checkpoint), smart.detect_model_type_and_size(checkpoint))

    print("== without args: numbers")
    converter = TensorParallelConverter()
    converter.validate_parallel_config(LAYERS, 2, 2, KV_HEADS, QUERY_HEADS)
    for name in ("minicpm", "llama"):
        convert = getattr(converter, f"convert_{name}_megatron_to_hf_tp_pp")
        result = convert(
            num_layer=LAYERS,
            tp_size=2,
            pp_size=2,
            in_dir=checkpoint,
            save_path=work / "out" / f"{name}.pt",
            num_kv_heads=KV_HEADS,
            num_query_heads=QUERY_HEADS,
            true_vocab_size=VOCABULARY,
        )
        print(name, same(result.path, model))

    print("== without args: presets")
    for convert in (convert_minicpm_8b, convert_llama_7b):
        result = convert(checkpoint, work / "out" / f"{convert.__name__}.pt", true_vocab_size=VOCABULARY)
        print(convert.__name__, same(result.path, model), *result.warnings)

    print("== a folder needs a configuration")
    folder = smart_convert_megatron_to_hf(checkpoint, work / "folder", format="directory", hf_config=model).path
    print(bool(verify(folder, model)))

    print("== tensors of the ranks")
    ranks = converter.load_distributed_checkpoints(checkpoint, tp_size=2, pp_size=2)
    print(len(ranks), tuple(ranks[1][f"decoder.layers.{LAYERS - 1}.mlp.linear_fc1.weight"].shape))

    print("== errors")
    try:
        smart_convert_megatron_to_hf(work / "nowhere", work / "out" / "none.pt")
    except FileNotFoundError as error:
        print("Checkpoint not found:", error)
    try:
        smart_convert_megatron_to_hf(checkpoint, work / "out" / "none.pt", num_query_heads=QUERY_HEADS, num_kv_heads=4)
    except AssertionError as error:
        print("Invalid configuration:", error)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            run(Path(temporary))
