"""The models on which graph rewrites are proved: real classes, small sizes, seeded random weights.

They build alike on transformers 4.57 with qwen-tts and on transformers 5 with qwen-tts-hf.
"""

from .cases import CASES, GROUPS, ModelCase, case, published
from .generation import build_talker, generate_codes, generation_inputs
from .session import Session

__all__ = ["CASES", "GROUPS", "ModelCase", "Session", "build_talker", "case", "generate_codes", "generation_inputs", "published"]
