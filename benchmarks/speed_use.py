"""Generation (benchmarks/speed.py): greedy answers of one unmerged LoRA, or of rows on several, with peft and ours."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from deltatune import activate, attach, load, rows, save, zoo
from deltatune.core.attach import parameters
from deltatune.evaluate.generate import Decoding, generate
from deltatune.methods import build
from speed_train import LORA, Peak, opened

Row = dict[str, Any]


def prepare(case: Any, data: Path, folder: Path) -> None:
    """Write prompts as tokens, and adapters with weights that change what is said."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.model_path(case.base))
    given = json.loads((data / case.source).read_text(encoding="utf-8"))[:: case.every][: case.rows]
    asked = [[{"role": "user", "content": f"{r['instruction']}\n{r.get('input') or ''}".strip()}] for r in given]
    texts = [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in asked]
    (folder / "prompts.json").write_text(json.dumps(texts))
    model = opened(case)
    for i in range(case.adapters):
        torch.manual_seed(i)
        attach(model, build(LORA), name=f"a{i}")
        for key, p in parameters(model, f"a{i}").items():
            if "lora_B" in key:
                p.data.normal_(std=0.02)
        save(model, f"a{i}", folder / f"a{i}", base=case.base)


def opening(case: Any, folder: Path) -> tuple[Any, Any, list[str]]:
    """The model and its tokenizer, neither with an end, so that every answer has as many tokens; and the prompts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.model_path(case.base), padding_side="left")
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.chat_template = tokenizer.eos_token, None, None
    model = opened(case).eval()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model, tokenizer, json.loads((folder / "prompts.json").read_text())


def spoken(case: Any, say: Callable[[int], list[str]]) -> Row:
    """Tokens per second of `new` tokens of every prompt, and what was said; `say` answers with so many tokens."""
    say(2)  # warms up
    began = time.perf_counter()
    said = say(case.new)
    seconds = time.perf_counter() - began
    return {"speed": len(said) * case.new / seconds, "unit": "tokens/s", "said": said, "seconds": seconds}


def generated(model: Any, tokenizer: Any, prompts: list[str], **how: Any) -> Callable[[int], list[str]]:
    """What transformers' own generation says, up to the first padding."""

    def say(new: int) -> list[str]:
        ids = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=new, do_sample=False, **how)
        made = [row[ids["input_ids"].shape[1] :].tolist() for row in out]
        made = [row[: (*row, tokenizer.pad_token_id).index(tokenizer.pad_token_id)] for row in made]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in made]

    return say


def names(case: Any) -> Sequence[str]:
    return [f"a{i % case.adapters}" for i in range(case.rows)]


def ours(case: Any, folder: Path) -> Row:
    peak, (model, tokenizer, prompts) = Peak(), opening(case, folder)
    for name in sorted(set(names(case))):
        load(model, folder / name, name)
    activate(model, "a0")
    with rows(model, names(case)) if case.adapters > 1 else nullcontext():
        found = spoken(case, lambda new: generate(model, tokenizer, prompts, Decoding(max_new_tokens=new)))
    return found | {"peak": peak.bytes()}


def peer(case: Any, folder: Path) -> Row:
    import peft

    peak, (model, tokenizer, prompts) = Peak(), opening(case, folder)
    adapted = peft.PeftModel.from_pretrained(model, folder / "a0", adapter_name="a0").eval()
    for name in sorted(set(names(case)) - {"a0"}):
        adapted.load_adapter(folder / name, name)
    how = {"adapter_names": names(case)} if case.adapters > 1 else {}
    return spoken(case, generated(adapted.eval(), tokenizer, prompts, **how)) | {"peak": peak.bytes()}


def base(case: Any, folder: Path) -> Row:
    """The untuned model."""
    peak, (model, tokenizer, prompts) = Peak(), opening(case, folder)
    return spoken(case, generated(model, tokenizer, prompts)) | {"peak": peak.bytes()}
