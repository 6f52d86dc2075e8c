"""Small trees in the form of Twitter2015, Sarcasm and NVGesture: lists, pictures, videos, and folders of encoders."""

import csv
import json

import cv2
import numpy as np
from PIL import Image

TWITTER_HEADER = "index\t#1 Label\t#2 ImageID\t#3 String\t#3 String"
FEELING_WORDS = ("awful", "plain", "lovely")
MEANING_WORDS = ("honest", "brilliant, of course")
PARTS = {"train": "train", "validation": "valid", "test": "test"}
GESTURES = 25
WINDOW = (2, 12)
"""First frame of a gesture and the first one behind it."""


def picture(path, colour, random):
    """Write a JPEG, 40 × 36, of one colour with some noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.array(colour) + random.normal(0, 12, (36, 40, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=95)


def video(path, frames, codec="MJPG"):
    """Write an AVI of frames ``(count, height, width, 3)`` in red, green and blue; FFV1 loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, height, width, _ = frames.shape
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 30, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()


def twitter2015(folder, train=12, later=6):
    """Write a tree of tweets: a word and the picture's colour tell the class; each picture has two targets."""
    random = np.random.default_rng(0)
    number = 0
    for part, count in {"train": train, "valid": later, "test": later}.items():
        lines = [TWITTER_HEADER]
        for place in range(count):
            feeling = place // 2 % 3
            if place % 2 == 0:
                number += 1
                colour = [220 if each == feeling else 40 for each in range(3)]
                picture(folder / "twitter2015_images" / f"{number}.jpg", colour, random)
            tweet = ("$T$ and Bob", "Ann and $T$")[place % 2]
            text = f'RT @ x : {tweet} are {FEELING_WORDS[feeling]} " today # n{number}'
            lines.append(f"{place + 1}\t{feeling}\t{number}.jpg\t{text}\t{('Ann', 'Bob')[place % 2]}")
        _write(folder / "annotations" / f"{part}_data.tsv", lines)


def sarcasm(folder, train=8, later=4):
    """Write a tree of tweets: words and the picture's colour tell the class; texts of class 0 have two lines."""
    random = np.random.default_rng(1)
    number = 0
    for part, count in {"train": train, "valid": later, "test": later}.items():
        path = folder / "annotations" / f"{part}_data.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "text", "label"])
            for place in range(count):
                number += 1
                label = place % 2
                picture(folder / "images" / f"{number}.jpg", [(200, 60, 60), (60, 60, 200)][label], random)
                text = f'what a "{MEANING_WORDS[label]}"' + "\n "[label] + f"day no {number}"
                writer.writerow([f"images/{number}.jpg", text, label])


def nvgesture(folder, classes=GESTURES, later=GESTURES):
    """Write a tree of gestures: a square whose place and brightness tell the class, in colour and by depth."""
    random = np.random.default_rng(2)
    subjects = {"train": (1, 2), "valid": (3,), "test": (4,)}
    for part, people in subjects.items():
        lines = []
        for subject in people:
            for label in range(classes if part == "train" else later):
                name = f"class_{label + 1:02d}/subject{subject}_r{subject % 2}"
                gesture(folder / "Video_data" / name, label, random)
                window = ":".join(map(str, WINDOW))
                lines.append(
                    f"path:./Video_data/{name} depth:sk_depth:{window} color:sk_color:{window} "
                    f"duo_left:duo_left:{window} label:{label + 1} "
                )
        _write(folder / f"nvgesture_{part}_correct_v2.lst", lines)


def gesture(folder, label, random, count=14):
    """Write the two videos of a gesture, 40 × 30."""
    colour = np.full((count, 30, 40, 3), 30, np.uint8)
    top, left = 2 + 4 * (label // 5), 2 + 5 * (label % 5)
    for place, frame in enumerate(colour):
        step = place % 4
        frame[top : top + 10, left + step : left + step + 10] = [90 + 6 * label, 200, 240 - 6 * label]
    noisy = np.clip(colour + random.normal(0, 3, colour.shape), 0, 255).astype(np.uint8)
    video(folder / "sk_color.avi", noisy)
    video(folder / "sk_depth.avi", np.repeat(noisy[..., 1:2], 3, axis=3))


def bert(folder, words):
    """Write a small BERT with a tokenizer of some words; ids from 5 in their order."""
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary), encoding="utf-8")


def clip(folder, words, side=32):
    """Write a small CLIP with a tokenizer of some words, ids from 64 in their order; letters have ids below."""
    from transformers import CLIPConfig, CLIPModel

    letters = ["!", *"abcdefghijklmnopqrstuvwxyz:"]
    bare = [*letters, *(f"{letter}</w>" for letter in letters)]
    bare += [f"unused{place}" for place in range(len(bare), 64)]
    made, merges = [], []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(" ".join(parts[:2]))
            parts[:2] = ["".join(parts[:2])]
            made.append(parts[0])
    made = [*(f"{word}</w>" for word in words), *(part for part in dict.fromkeys(made) if not part.endswith("</w>"))]
    vocabulary = [*bare, *made, "<|startoftext|>", "<|endoftext|>"]
    begin, end = len(vocabulary) - 2, len(vocabulary) - 1
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": len(vocabulary), "bos_token_id": begin, "eos_token_id": end},
        vision_config=sizes | {"image_size": side, "patch_size": 8},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({piece: place for place, piece in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in ["#version: 0.2", *dict.fromkeys(merges)]))


def change(path, line, old, new):
    """Put other text into a line of a list, from 1."""
    lines = path.read_bytes().split(b"\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_bytes(b"\n".join(lines))


def _write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
