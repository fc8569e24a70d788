"""Embedded archives of one structure are parsed once; anything else about one than its bytes and checksums has it parsed anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.basics.json_values import indented
from megatron_converters.storage import embedded, torch_zip
from megatron_converters.storage.embedded import EmbeddedTensors
from megatron_converters.storage.tensor import release_mappings


def test_archives_of_one_structure_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [
        torch.full(shape, float(number)) for number, shape in enumerate([(2, 6), (2, 6), (6, 2), (2, 6), (6, 2)])
    ]
    path, spans = _joined(tmp_path, tensors)
    plain = [torch_zip.read_embedded(str(path), *span) for span in spans]
    parsed = []
    monkeypatch.setattr(
        embedded.torch_zip, "read_embedded", lambda *span: (parsed.append(span), torch_zip_read(*span))[1]
    )
    reader = EmbeddedTensors()
    found = [reader.read(str(path), *span) for span in spans]
    assert found == plain
    assert len({nbytes for _, nbytes in spans}) == 1
    assert [start for _, start, _ in parsed] == [spans[0][0], spans[2][0]]
    assert all((data.array() == tensor.numpy().view("u4")).all() for data, tensor in zip(found, tensors, strict=True))


@pytest.mark.parametrize("record", [b"_rebuild_tensor", b"little", b"PK\1\2"])
def test_an_archive_that_is_damaged_is_refused_as_the_first_would_be(tmp_path: Path, record: bytes) -> None:
    path, spans = _joined(tmp_path, [torch.zeros(2, 6)] * 2)
    content = bytearray(path.read_bytes())
    content[content.index(record, spans[1][0])] ^= 1
    path.write_bytes(content)
    reader = EmbeddedTensors()
    reader.read(str(path), *spans[0])
    with pytest.raises(ConversionError):
        reader.read(str(path), *spans[1])
    release_mappings()


def test_indented_json_has_lines_as_far_down_as_it_is_asked() -> None:
    import json

    value = {"a": [], "b": {}, "c": [1, 'é\n"', None, True, 1.5, [[]], {"x": [0]}], "d": {"e": {"f": -1}}, "": ["t"]}
    assert indented(value, 9) == json.dumps(value, indent=1)
    assert indented(value, 0) == json.dumps(value)
    assert indented({"a": {"b": {"c": [1, 2]}}, "d": 1.5}, 2) == '{\n "a": {\n  "b": {"c": [1, 2]}\n },\n "d": 1.5\n}'


torch_zip_read = torch_zip.read_embedded


def _joined(folder: Path, tensors: list[torch.Tensor]) -> tuple[Path, list[tuple[int, int]]]:
    """File of one archive for each tensor, and the places of these."""
    path, spans = folder / "joined", []
    with open(path, "wb") as file:
        for tensor in tensors:
            start = file.tell()
            torch.save(tensor, file)
            spans.append((start, file.tell() - start))
    return path, spans
