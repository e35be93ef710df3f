"""Formats a plan for the terminal."""

from typing import Any

_WIDTH = 16


def format_plan(plan: dict[str, Any]) -> str:
    """Formats the plan of [`nkd_hf.recipe.plan.make_plan`] as lines of text."""
    loss_args = _format_arguments(plan["loss_args"])
    own = f"; {_format_count(plan['loss_parameters'])} parameters of its own" if plan["loss_parameters"] else ""
    epochs = f"{plan['epochs']:g} epochs of {plan['num_train_images']:,} images"
    if plan["decoded_images"] < plan["num_train_images"]:
        epochs += f", {plan['decoded_images']:,} of them decoded"
    lines = [
        ("student", f"{_format_model(plan['student'])}, {plan['student']['num_classes']} classes"),
        *_label_first("teacher", _format_teacher(plan["teacher"])),
        ("loss", f"{plan['distillation_loss']}{loss_args and f' ({loss_args})'}{own}"),
        *[
            (_TAPS[name], f"{tap['module']}: {tap['channels']} channels, {tap['reads']}")
            for name, tap in plan["taps"].items()
        ],
        ("trains", _RUNS[tuple(plan["runs"])]),
        None,
        ("global batch", _format_batch(plan)),
        ("steps", f"{plan['num_steps']:,}, {_format_number(plan['steps_per_epoch'])} an epoch, {epochs}"),
        ("input", _format_input(plan["input"])),
        *_label_first("without labels", [plan["unlabeled"]] if plan["unlabeled"] else []),
        ("precision", plan["precision"]),
        ("optimiser", ", ".join(_format_optimizer(plan))),
        *_label_first("", _format_groups(plan["optimizer_groups"])),
        ("schedule", f"{plan['lr_scheduler_type']}{_put_in_brackets(_format_arguments(plan['lr_scheduler_kwargs']))}"),
        *_label_first("learning rate", _format_rates(plan["lr_by_epoch"])),
        *_label_first("augmentation", plan["augmentation"]),
        None,
        ("disk", f"at least {_format_size(plan['disk']['total'])}, without the dataset"),
        *_label_first("", _format_disk(plan)),
        *_label_first("stored logits", [_format_store(plan)] if plan["store"] else []),
        ("memory", f"at least {_format_size(plan['memory']['total'])} on each GPU, without kernels' workspaces"),
        *_label_first("", _format_memory(plan)),
    ]
    text = ["" if line is None else f"{line[0]:{_WIDTH}}{line[1]}" for line in lines]
    return "\n".join([*text, *[f"\nNote: {note.rstrip('.')}." for note in plan["notes"]]])


_TAPS = {"mid_feature": "tap", "student_low": "tap, low", "student_high": "tap, high", "student_map": "tap, map"}
_RUNS = {
    ("student",): "the student",
    ("baseline",): "the student without a distillation loss",
    ("baseline", "student"): "the student twice: without the distillation loss, then with it",
    ("teacher", "student"): "the teacher, then the student, each for all steps",
    ("teacher", "baseline", "student"): "the teacher, then the student without and with the loss, each for all steps",
}


def _label_first(label: str, lines: list[str]) -> list[tuple[str, str]]:
    return [(label if i == 0 else "", line) for i, line in enumerate(lines)]


def _format_model(model: dict[str, Any]) -> str:
    if model["parameters"] is None:
        return f"{model['name']}: parameters and GMACs unknown (see the notes)"
    height, width = model["image_size"]
    return f"{model['name']}: {_format_count(model['parameters'])} parameters, {model['gmacs']:.2f} GMACs at {height}x{width}"


def _format_teacher(teacher: dict[str, Any] | None) -> list[str]:
    if teacher is None:
        return ["none"]
    if "members" not in teacher:
        return [_format_model(teacher)]
    members = teacher["members"]
    known = teacher["parameters"] is not None
    sums = (
        f"{_format_count(teacher['parameters'])} parameters, {teacher['gmacs']:.2f} GMACs"
        if known
        else "not all known"
    )
    return [
        f"{len(members)}, whose probabilities are averaged: {sums}",
        *(f"{_format_model(member)}, weight {member['weight']:.3g}" for member in members),
    ]


def _format_batch(plan: dict[str, Any]) -> str:
    batch, accumulation = plan["per_device_train_batch_size"], plan["gradient_accumulation_steps"]
    return f"{plan['global_batch_size']} images: {plan['num_processes']} GPUs x {batch} x accumulation {accumulation}"


def _format_optimizer(plan: dict[str, Any]) -> list[str]:
    parts = [f"{plan['optimizer']}{_put_in_brackets(plan['optimizer_args'] or '')}"]
    parts.append(f"gradients clipped at norm {plan['max_grad_norm']:g}" if plan["max_grad_norm"] else "no clipping")
    if plan["ema_decay"] is not None:
        parts.append(f"moving average of the weights with decay {plan['ema_decay']:g}")
    if plan["precise_bn_images"] is not None:
        parts.append(f"BatchNorm re-estimated on {plan['precise_bn_images']:,} images before each evaluation")
    return parts


def _format_groups(groups: list[dict[str, Any]]) -> list[str]:
    return [
        f"weight decay {group['weight_decay']:<8g}{group['parameters']:>13,} parameters in {group['tensors']} tensors"
        + (f", {group['loss_parameters']:,} of them the loss's" if group["loss_parameters"] else "")
        for group in groups
    ]


def _format_rates(rates: list[float] | None) -> list[str]:
    """Formats each new learning rate; of more than twelve, only about a dozen with the highest one."""
    if rates is None:
        return ["unknown (see the notes)"]
    starts = [epoch for epoch, rate in enumerate(rates) if epoch == 0 or rate != rates[epoch - 1]]
    if len(starts) <= 12:
        ends = [start - 1 for start in starts[1:]] + [len(rates) - 1]
        names = [
            f"epoch {start}" + (f" to {end}" if end > start else "") for start, end in zip(starts, ends, strict=True)
        ]
        return [f"{name:<18}{rates[start]:g}" for name, start in zip(names, starts, strict=True)]
    shown = {0, len(rates) - 1, rates.index(max(rates)), *range(0, len(rates), -(-len(rates) // 10))}
    return [f"{f'epoch {epoch}':<18}{rates[epoch]:.4g}" for epoch in sorted(shown)]


def _format_disk(plan: dict[str, Any]) -> list[str]:
    disk = plan["disk"]
    one = (
        f"{_format_size(disk['checkpoint'])} each"
        if len(plan["runs"]) == 1
        else f"the student's {_format_size(disk['checkpoint'])} each"
    )
    lines = {
        f"checkpoints: up to {disk['num_checkpoints']} at once, {one}": disk["checkpoints"],
        "the saved models": disk["models"],
        "the teacher's weights": disk["teacher"],
    }
    return [f"{_format_size(size):>10}  {text}" for text, size in lines.items() if size]


def _format_input(costs: dict[str, float]) -> str:
    hours = f"{costs['core_hours']:,.1f} core-hours for JPEGs of 500 x 375"
    return f"{costs['samples']:,} samples of {costs['decoded_images']:,} decoded images: {hours}"


def _format_store(plan: dict[str, Any]) -> str:
    store, images = plan["store"], plan["num_train_images"]
    logits = "all logits" if store["top_k"] is None else f"the {store['top_k']} largest logits"
    repeated = "" if store["cycle"] is None else ", which training repeats"
    return (
        f"{_format_size(store['bytes'])}: {store['epochs']} epochs of {images:,} images{repeated}, {logits}, "
        f"{store['bytes_per_sample']} bytes each"
    )


def _format_memory(plan: dict[str, Any]) -> list[str]:
    what = {
        "weights": "weights of student and loss",
        "gradients": "gradients",
        "optimizer_state": "state of the optimiser",
        "moving_average": "moving average of the student",
        "teacher": f"teacher, in {plan['teacher_dtype']}",
        "pixels": "images of a batch",
        "activations": "activations of the student that the backward pass needs"
        + (f", 2 bytes a value ({plan['precision']})" if plan["precision"] != "float32" else ", in float32"),
    }
    sizes = plan["memory"]
    return [
        f"{'unknown' if sizes[name] is None else _format_size(sizes[name]):>10}  {text}"
        for name, text in what.items()
        if sizes[name] != 0
    ]


def _format_arguments(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_format_value(value)}" for name, value in arguments.items())


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_format_arguments(value)})"
    if isinstance(value, list):
        return "/".join(_format_value(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _put_in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _format_number(value: float) -> str:
    return f"{value:,}" if value == int(value) else f"{value:,.2f}"


def _format_count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number:,}"


def _format_size(number: int) -> str:
    unit, name = next(
        (unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if number >= unit or unit == 1e3
    )
    return f"{number / unit:.{1 if unit == 1e9 else 0}f} {name}"
