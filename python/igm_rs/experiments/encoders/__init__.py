"""The paper's encoders, at full size and small: ResNets, BERT, CLIP's two, I3D; weights random or from local files."""

from .bert import text_bert
from .clip import clip_image, clip_text
from .i3d import i3d
from .resnet import audio_resnet18, frames_resnet18, image_resnet50
from .spec import EncoderSpec

__all__ = [
    "EncoderSpec",
    "audio_resnet18",
    "clip_image",
    "clip_text",
    "frames_resnet18",
    "i3d",
    "image_resnet50",
    "text_bert",
]
