"""Tiny CLIP and SigLIP models with random weights, and a tokenizer of letters."""

import string

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_LENGTH = 32


def save_image_text_model(kind: str, folder: str, seed: int = 0, scale: float = 10.0) -> CLIPModel | SiglipModel:
    """Saves a `clip` or a `siglip` with tokenizer and image processor, and returns it; its logits have this scale."""
    tokenizer = save_tokenizer(folder)
    size = {"height": 32, "width": 32}
    text = _SIZES | {
        "vocab_size": len(tokenizer), "max_position_embeddings": _LENGTH, "projection_size": 16,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = _SIZES | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(seed)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        SiglipImageProcessor(size=size).save_pretrained(folder)
        torch.nn.init.constant_(model.logit_bias, -5.0)
    with torch.no_grad():
        model.logit_scale.fill_(scale).log_()
        for parameter in model.parameters():  # larger ones, so that the answer depends on text and image
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.eval().save_pretrained(folder)
    return model


def save_tokenizer(folder: str) -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *string.digits, "."]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({word: number for number, word in enumerate(words)}, [], model_max_length=_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer
