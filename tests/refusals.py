"""Every cell of method x family that is refused, with the reason. What is not listed here must work."""

from __future__ import annotations

NO_BIASES = "the family's layers have no biases to train"

# (variant, family) -> why attach() refuses it
REFUSED: dict[tuple[str, str], str] = {
    ("bitfit", family): NO_BIASES for family in ("llama", "qwen", "mistral", "gemma", "phi3", "modernbert", "t5")
}

# variant -> why merge() refuses it
UNMERGEABLE = {
    "adapter": "a non-linearity has no equivalent weight",
    **dict.fromkeys(("parallel", "houlsby", "pfeiffer", "sparse"), "a non-linearity has no equivalent weight"),
    "prefix": "keys and values have no equivalent weight",
    "prefix+head": "keys and values have no equivalent weight",
    "prefix-mlp": "keys and values have no equivalent weight",
    "prompt": "virtual ids have no row in the embedding",
    "spottune": "which change a sequence gets depends on the sequence",
    "spottune-full": "which change a sequence gets depends on the sequence",
    "gate": "its gates depend on the sequence",
    "prompts": "virtual ids have no row in the embedding",
    "ptuning": "virtual ids have no row in the embedding",
    "ptuning-mlp": "virtual ids have no row in the embedding",
    "mam": "neither part has an equivalent weight",
}

# variant -> why rows() refuses it
ROWLESS = dict.fromkeys(
    ("freeze", "full", "head", "lora+head", "prefix+head", "houlsby"),
    "a weight per row would be a copy of the weights per row",
)

# (variant, family) -> why there is no peft form, for variants whose method peft has
MASKED = ("bert", "roberta", "distilbert", "electra", "modernbert")
NO_PEFT_FORM: dict[tuple[str, str], str] = {
    **{("prefix", family): "peft's prefix slides out of the attention window" for family in ("mistral", "gemma")},
    **{("prefix", family): "peft gives encoder and cross-attention no prefix" for family in ("t5", "bart")},
    **{("prefix", family): "peft has no prefix for masked language models" for family in MASKED},
    **{("prompt", family): "peft has no prompt for masked language models" for family in MASKED},
}

# unions that have no peft form although each of their parts has one
NEVER_PEFT = {
    "prefix-mlp": "only the folded prefix has a peft form",
    "prompts": "peft trains one prompt at a time",
    "lora+ia3": "a peft folder holds one method",
    "mam": "a peft folder holds one method",
    "prefix+head": "peft's form of a prefix beside a head is not written yet",
}
