"""Generation (benchmarks/speed.py): greedy answers of one unmerged LoRA, or of rows on several, with peft and ours."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from deltatune import activate, attach, load, rows, save, zoo
from deltatune.core.attach import parameters
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


def inputs(case: Any, folder: Path) -> tuple[Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.model_path(case.base), padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer(json.loads((folder / "prompts.json").read_text()), padding=True, return_tensors="pt"), tokenizer


def spoken(case: Any, model: Any, ids: Any, **how: Any) -> Row:
    """Tokens per second of `new` tokens of every prompt, and what was said."""
    ids = ids.to(model.device)
    exact = {"max_new_tokens": case.new, "min_new_tokens": case.new, "do_sample": False}
    with torch.no_grad():
        model.generate(**ids, max_new_tokens=2, do_sample=False, **how)  # warms up
        began = time.perf_counter()
        out = model.generate(**ids, **exact, **how)
    said = out[:, ids["input_ids"].shape[1] :]
    seconds = time.perf_counter() - began
    return {"speed": said.numel() / seconds, "unit": "tokens/s", "said": said.tolist(), "seconds": seconds}


def names(case: Any) -> Sequence[str]:
    return [f"a{i % case.adapters}" for i in range(case.rows)]


def ours(case: Any, folder: Path) -> Row:
    peak, model = Peak(), opened(case).eval()
    for name in sorted(set(names(case))):
        load(model, folder / name, name)
    activate(model, "a0")
    with rows(model, names(case)) if case.adapters > 1 else nullcontext():
        found = spoken(case, model, inputs(case, folder)[0])
    return found | {"peak": peak.bytes()}


def peer(case: Any, folder: Path) -> Row:
    import peft

    peak, model = Peak(), opened(case).eval()
    model = peft.PeftModel.from_pretrained(model, folder / "a0", adapter_name="a0")
    for name in sorted(set(names(case)) - {"a0"}):
        model.load_adapter(folder / name, name)
    how = {"adapter_names": names(case)} if case.adapters > 1 else {}
    return spoken(case, model.eval(), inputs(case, folder)[0], **how) | {"peak": peak.bytes()}


def base(case: Any, folder: Path) -> Row:
    """The untuned model."""
    peak, model = Peak(), opened(case).eval()
    return spoken(case, model, inputs(case, folder)[0]) | {"peak": peak.bytes()}
