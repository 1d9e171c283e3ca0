"""Every cell of method x family that is refused, with the reason. What is not listed here must work."""

from __future__ import annotations

from models import ALL

NO_BIASES = "the family's layers have no biases to train"

# (variant, family) -> why attach() refuses it
REFUSED: dict[tuple[str, str], str] = {
    ("bitfit", family): NO_BIASES for family in ("llama", "qwen", "mistral", "gemma", "phi3", "modernbert", "t5")
}
SOFT = ("prompt", "prompts", "prompt-tasks", "ptuning", "ptuning-mlp")
REFUSED |= {(variant, family): "its input is no tokens" for variant in SOFT for family in ("vit", "whisper")}
REFUSED |= {("tokens", "vit"): "its input is no tokens"}
REFUSED |= {("spottune", "clip"): "one policy, two inputs", ("spottune-full", "clip"): "one policy, two inputs"}
REFUSED |= {("spottune-prefix", "clip"): "one policy, two inputs"}
REFUSED |= {
    (variant, family): "it reads no images"
    for variant in ("visual_prompt", "visual-deep")
    for family in ALL
    if family not in ("vit", "clip")
}

# variant -> why merge() refuses it
UNMERGEABLE = {
    "adapter": "a non-linearity has no equivalent weight",
    **dict.fromkeys(("parallel", "houlsby", "pfeiffer", "sparse"), "a non-linearity has no equivalent weight"),
    "prefix": "keys and values have no equivalent weight",
    "prefix+head": "keys and values have no equivalent weight",
    "prefix-mlp": "keys and values have no equivalent weight",
    "visual_prompt": "tokens beside the patches have no equivalent weight",
    "visual-deep": "tokens beside the patches have no equivalent weight",
    "prompt": "virtual ids have no row in the embedding",
    "spottune": "which change a sequence gets depends on the sequence",
    "spottune-prefix": "which change a sequence gets depends on the sequence",
    "spottune-full": "which change a sequence gets depends on the sequence",
    "gate": "its gates depend on the sequence",
    "prompt-tasks": "virtual ids have no row in the embedding",
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
ROWLESS |= dict.fromkeys(("visual_prompt", "visual-deep"), "rows of one batch have equally many tokens")

# (variant, family) -> why there is no peft form, for variants whose method peft has
MASKED = ("bert", "roberta", "distilbert", "electra", "modernbert")
NO_PEFT_FORM: dict[tuple[str, str], str] = {
    **{("prefix", family): "peft's prefix slides out of the attention window" for family in ("mistral", "gemma")},
    **{("prefix", family): "peft gives encoder and cross-attention no prefix" for family in ("t5", "bart")},
    **{("prefix", family): "peft has no prefix for masked language models" for family in MASKED},
    **{("prompt", family): "peft has no prompt for masked language models" for family in MASKED},
    **{("prefix", family): "peft has no prefix for these models" for family in ("vit", "clip", "whisper")},
    ("prompt", "clip"): "peft has no prompt for CLIP",
}

# unions that have no peft form although each of their parts has one
NEVER_PEFT = {
    "prefix-mlp": "only the folded prefix has a peft form",
    "ptuning": "only the folded prompt has a peft form",
    "ptuning-mlp": "only the folded prompt has a peft form",
    "prompt-tasks": "peft trains one prompt at a time",
    "prompts": "peft trains one prompt at a time",
    "lora+ia3": "a peft folder holds one method",
    "mam": "a peft folder holds one method",
    "prefix+head": "peft's form of a prefix beside a head is not written yet",
}
