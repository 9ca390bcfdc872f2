import pytest

from qtts_compile.kernels.turboquant.format import Format


@pytest.mark.parametrize(("name", "key_bytes", "value_bytes"), [("int4", 64, 64), ("k4v3", 64, 48), ("int3", 48, 48), ("fp8", 128, 128)])
def test_bytes(name, key_bytes, value_bytes):
    format = Format.parse(name)
    assert (format.name, format.key_bytes(128), format.value_bytes(128)) == (name, key_bytes, value_bytes)
    assert format.bytes_per_token(128) == key_bytes + value_bytes + 4


def test_is_a_key():
    assert {Format.parse("int4"): 1}[Format.parse("int4")] == 1
    assert len({Format.parse(name) for name in ("int4", "int3", "k4v3", "fp8")}) == 4


@pytest.mark.parametrize("name", ["bf16", "int8", "INT4", ""])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=f"one of int4, k4v3, int3, fp8, got '{name}'"):
        Format.parse(name)


@pytest.mark.parametrize("head_dim", [-32, 0, 8, 16, 24, 96])
def test_unsupported_head_dim(head_dim):
    for method in (Format.parse("int3").key_bytes, Format.parse("fp8").value_bytes, Format.parse("int4").bytes_per_token):
        with pytest.raises(ValueError, match=f"power of two from 32 on, got {head_dim}"):
            method(head_dim)
