"""What a launcher takes of torch.compile's modes and options."""

import pytest
import torch

from qtts_compile.launcher import Launcher
from qtts_compile.options import Options

CPU = torch.device("cpu")


def test_options_stand_beside_those_of_the_mode():
    parsed = Options.parse(None, Launcher(CPU, "max-autotune-no-cudagraphs", options={"max-autotune": False, "strict": True}).options)
    assert parsed.strict and parsed.config_patches() == {"max_autotune": False, "coordinate_descent_tuning": True}
    assert Launcher(CPU, "default", options={"triton.cudagraphs": False, "executor": "eager"}).options == {"executor": "eager"}


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("default", {"nonsense": 1}, "unknown option 'nonsense'"),
        ("default", {"kv-cache": "int4"}, "unknown option 'kv-cache'; valid: .*kv_cache"),
        ("default", {"layers": (2, 1)}, "impossible range"),
        ("default", {"mode": "default"}, "'mode': 'default'}: give it to TTS itself, mode='default'"),
        (None, {"mode": "reduce-overhead"}, "give it to TTS itself, mode='reduce-overhead'"),
        (None, {"kv_cache": "int4"}, "give it to TTS itself, kv_cache='int4'"),
        (None, {"strict": True}, "mode=None does not compile: name a mode"),
    ],
)
def test_wrong_options_are_refused_at_once(mode, options, message):
    with pytest.raises(ValueError, match=message):
        Launcher(CPU, mode, options=options)


def test_another_backend_s_options_are_its_own():
    assert Launcher(CPU, "default", "mine", {"nonsense": 1}).options == {"nonsense": 1}
