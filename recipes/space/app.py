"""A Space that shows student, baseline and teacher side by side: drop an image, read top-5 and latency of each.

    STUDENT=ME/resnet18-nkd BASELINE=ME/resnet18 TEACHER=timm/resnet34.tv_in1k python app.py

Each variable holds a Hub id or a folder; STUDENT must be set, the others are omitted where they are not. It needs nothing
of nkd_hf. README.md says how it becomes a Space.
"""

import os
import statistics
import time

import gradio as gr
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, ImageClassificationPipeline, pipeline
from transformers.utils import ADAPTER_CONFIG_NAME, cached_file

ROLES = ("student", "baseline", "teacher")
TIMED_RUNS = 3
# The formats that are opened: Pillow hands EPS to Ghostscript, a program that runs what the file says.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
# Resizing the short side makes a strip of 3000 x 1 pixels a picture of hundreds of megabytes.
MAX_ASPECT_RATIO = 50


def open_model(name: str) -> ImageClassificationPipeline:
    """The model of a Hub id or a folder, and its own preprocessing."""
    trust = os.environ.get("TRUST_REMOTE_CODE") == "1"
    # transformers would open the model that the file names, whatever that is.
    if cached_file(name, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False):
        raise ValueError(f"it has an {ADAPTER_CONFIG_NAME}: merge the adapter into its model, and give that.")
    model, loaded = AutoModelForImageClassification.from_pretrained(
        name,
        use_safetensors=True,  # A pickle can run code when it is opened.
        trust_remote_code=trust,
        output_loading_info=True,
    )
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"it is no whole image classifier: {len(missing)} weights are missing, {missing[0]} first.")
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust)
    classifier = pipeline("image-classification", model=model, image_processor=processor)
    classifier(Image.new("RGB", (224, 224)))  # A model that cannot answer should say so before the page is there.
    return classifier


def open_models() -> tuple[dict[str, ImageClassificationPipeline], dict[str, str]]:
    """The models that the environment names, and why the others are missing, both by role."""
    models, missing = {}, {}
    for role in ROLES:
        name = os.environ.get(role.upper(), "").strip()
        if not name:
            missing[role] = f"{role.upper()} is not set: give it a Hub id or a folder."
            continue
        try:
            models[role] = open_model(name)
        except Exception as error:  # What the Hub, a config and a model's own code raise is open-ended.
            print(f"{role.upper()}={name}: {type(error).__name__}: {error}", flush=True)
            cause = " ".join(str(error).split()) or type(error).__name__
            if "trust_remote_code" in cause:
                cause = "it comes with code of its own. If you trust that, set TRUST_REMOTE_CODE to 1."
            missing[role] = f"{role.upper()}={name} could not be opened: {cause}"
    return models, missing


def classify(models: dict[str, ImageClassificationPipeline], image: Image.Image) -> dict[str, tuple[dict, float]]:
    """By role: the five best classes with their probabilities, and the median latency in ms."""
    answers, seconds = {}, {role: [] for role in models}
    # In turns, so that whatever else the machine does meets them all; the first turn warms up and is not counted.
    for _ in range(1 + TIMED_RUNS):
        for role, classifier in models.items():
            start = time.perf_counter()
            answers[role] = classifier(image, top_k=5)
            seconds[role].append(time.perf_counter() - start)
    results = {}
    for role, answer in answers.items():
        scores = {}
        for entry in answer:
            # Names repeat: ImageNet has two classes called crane.
            label = entry["label"]
            while label in scores:
                label += " "
            scores[label] = entry["score"]
        results[role] = scores, 1000 * statistics.median(seconds[role][1:])
    return results


class SizeError(ValueError):
    """An image of a size that would take all memory."""


def read_image(path: str) -> Image.Image:
    """The upright RGB image of a file, as `pipeline` reads it."""
    image = Image.open(path, formats=FORMATS)
    width, height = image.size
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise SizeError(f"**{width} x {height} pixels are too large an image.** Scale it down.")
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise SizeError(
            f"**{width} x {height} pixels are too narrow an image.** Cut it to less than {MAX_ASPECT_RATIO} : 1."
        )
    return ImageOps.exif_transpose(image).convert("RGB")


def build() -> gr.Blocks:
    """The page, or a page that says what to set where there is no student."""
    models, missing = open_models()
    with gr.Blocks(title="Student, baseline, teacher") as page:
        gr.Markdown("# Student, baseline, teacher")
        if "student" not in models:
            gr.Markdown(
                f"**There is no student to show.** {missing['student']} On a Space, it is a variable in the settings.",
                elem_id="error",
            )
            return page

        gr.Markdown("Drop an image: each model answers with its five best classes and the time that it took.")
        image = gr.Image(sources=["upload", "clipboard"], label="Image", height=260, buttons=[], elem_id="image")
        # The file as it was dropped: gr.Image would decode it here, with an error of its own if it is broken.
        image.preprocess = lambda payload: payload.path if payload else None
        status = gr.Markdown(elem_id="status")
        outputs = []
        with gr.Row():
            for role, classifier in models.items():
                with gr.Column(min_width=240):
                    gr.Markdown(f"## {role.capitalize()}")
                    outputs.append(gr.Label(label=f"Top 5 of the {role}", elem_id=f"{role}-labels"))
                    outputs.append(gr.Markdown(elem_id=f"{role}-latency"))
                    count = classifier.model.num_parameters()
                    size = f"{count / 1e6:.1f} million" if count > 1e6 else f"{count / 1e3:.0f} thousand"
                    # Last, since names of one line and of two would put the answers at different heights.
                    gr.Markdown(f"`{os.environ[role.upper()].strip()}`, {size} parameters")
        device, threads = models["student"].device, torch.get_num_threads()
        where = f"{device} ({threads} thread{'s' * (threads > 1)})" if device.type == "cpu" else str(device)
        notes = [
            f"Latency: preprocessing and forward pass of one decoded image on {where}, median of {TIMED_RUNS} runs "
            "after one that is not counted.",
            *(f"The {role} is omitted. {reason}" for role, reason in missing.items()),
        ]
        gr.Markdown("  \n".join(notes), elem_id="notes")

        def answer(path: str | None) -> list:
            nothing = [None, ""] * len(models)
            if path is None:
                return ["", *nothing]
            try:
                decoded = read_image(path)
            except SizeError as error:
                return [str(error), *nothing]
            except Exception as error:  # Pillow's decoders raise nearly anything.
                print(f"{path}: {type(error).__name__}: {error}", flush=True)
                return ["**This file cannot be read as an image.** Try a PNG, JPEG or WebP.", *nothing]
            results = [""]
            for scores, latency in classify(models, decoded).values():
                results += [scores, f"**{latency:.1f} ms**"]
            return results

        image.change(answer, image, [status, *outputs], api_name="classify")
    return page


if __name__ == "__main__":
    # Fonts of the reader's system: the page asks no other host for anything.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build().launch(theme=theme, footer_links=["api", "gradio", "settings"])
