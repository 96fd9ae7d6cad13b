"""The two U-Nets of MedSASS (appendix A.1), and their encoders in files. Torch and timm: copy it.

    from models import build_unet, load_encoder
    unet = build_unet("resnet50")                   # or build_unet("vit_small", img_size=224)
    logits = unet(images)       # (B, 3, H, W), ImageNet-normalised -> (B, 1, H, W)
    load_encoder(unet, "encoder.pth")

`.encoder` is the part that is transferred; all else is the decoder.
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch.utils.checkpoint import checkpoint

BACKBONES = {"resnet50": "resnet50", "vit_small": "vit_small_patch8_224"}  # ours -> timm's name
SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# A tensor that only this backbone has: it tells files apart, and gives their names' prefix.
ANCHORS = {"resnet50": "layer1.0.conv1.weight", "vit_small": "blocks.0.attn.qkv.weight"}


class Gate(torch.autograd.Function):
    """x * channel + x * spatial; (B, C, H, W), (B, C, 1, 1), (B, 1, H, W) -> (B, C, H, W). Autograd
    would take the product x * grad twice, and hold more maps of full size at a time."""

    @staticmethod
    def forward(ctx, x, channel, spatial):
        ctx.save_for_backward(x, channel, spatial)
        return (x * channel).addcmul_(x, spatial)

    @staticmethod
    def backward(ctx, grad):
        x, channel, spatial = ctx.saved_tensors
        product = x * grad
        sums = product.sum((2, 3), keepdim=True), product.sum(1, keepdim=True)
        return torch.mul(grad, channel, out=product).addcmul_(grad, spatial), *sums


class SCSE(nn.Module):
    """Concurrent spatial and channel squeeze-and-excitation (Roy et al. 2018), (B, C, H, W)."""

    def __init__(self, channels, reduction=16):
        super().__init__()
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid())
        self.spatial = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x):
        channel, spatial = self.channel(x), self.spatial(x)
        if not torch.is_grad_enabled():  # for torch.jit.trace as well, which knows no Function
            return (x * channel).addcmul_(x, spatial)
        return Gate.apply(x, channel, spatial)


def double_conv(in_channels, out_channels):
    """The paper's DC block: twice convolution, BatchNorm, ReLU. (B, in, H, W) -> (B, out, H, W)."""
    convs = []
    for channels in (in_channels, out_channels):
        convs.append(nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True)))
    return nn.Sequential(*convs)


def init_conv(module):
    """He's uniform initialisation and zero biases, as in segmentation_models_pytorch's decoders."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_uniform_(m.weight, nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class UpBlock(nn.Module):
    """A decoder block: nearest x2, skip by concatenation, scSE, two convolutions, scSE."""

    def __init__(self, in_channels, skip_channels, out_channels):
        super().__init__()
        self.attention1 = SCSE(in_channels + skip_channels)     # idle without skip, as in smp
        self.convs = double_conv(in_channels + skip_channels, out_channels)
        self.attention2 = SCSE(out_channels)

    def first_conv(self, x, size, skip):
        """Up to the first BatchNorm. (B, in, h, w), (B, skip, *size) -> (B, out, *size)."""
        conv = self.convs[0][0]
        if skip is None and size == (2 * x.shape[2], 2 * x.shape[3]):
            # As a transposed convolution whose 4x4 kernel sums the weights that meet the same pixel
            # of x: 16 products a pixel instead of 36.
            sums = 4 * F.avg_pool2d(F.pad(conv.weight, (1, 1, 1, 1)), 2, stride=1)
            sums = sums.flip(2, 3).transpose(0, 1)              # (in, out, 4, 4)
            return F.conv_transpose2d(x, sums, stride=2, padding=1)
        x = F.interpolate(x, size=size, mode="nearest")
        if skip is not None:
            x = self.attention1(torch.cat([x, skip], dim=1))
        return conv(x)

    def forward(self, x, size, skip=None):
        # first_conv's wide maps are recomputed for the gradient, not kept.
        x = checkpoint(self.first_conv, x, size, skip, use_reentrant=False,
                       preserve_rng_state=False)
        return self.attention2(self.convs[1](self.convs[0][1:](x)))


class ResNet50UNet(nn.Module):
    """segmentation_models_pytorch's Unet("resnet50", encoder_depth=3, decoder_channels=(256, 128,
    64), decoder_attention_type="scse") without layer3 and layer4, which that builds and never uses.
    (B, 3, H, W) -> (B, 1, H, W) logits, any H and W. 4,536,047 parameters."""

    def __init__(self):
        super().__init__()
        # features_only drops what lies past layer2; zero_init_last=False is torchvision's start.
        self.encoder = timm.create_model(BACKBONES["resnet50"], features_only=True,
                                         out_indices=(0, 1, 2), zero_init_last=False)
        self.up1 = UpBlock(512, 256, 256)                       # layer2 with layer1
        self.up2 = UpBlock(256, 64, 128)                        # with the stem
        self.up3 = UpBlock(128, 0, 64)                          # full size, no skip
        self.head = nn.Conv2d(64, 1, 3, padding=1)
        for part in (self.up1, self.up2, self.up3):
            init_conv(part)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        stem, layer1, layer2 = self.encoder(x)  # (B, 64, H/2), (B, 256, H/4), (B, 512, H/8)
        y = self.up1(layer2, layer1.shape[2:], layer1)          # (B, 256, H/4)
        y = self.up2(y, stem.shape[2:], stem)                   # (B, 128, H/2)
        y = self.up3(y, x.shape[2:])                            # (B, 64, H)
        return self.head(y)


class ViTSmallUNet(nn.Module):
    """The paper's Figure 5: a convolutional U-Net whose bottleneck also sees the patch tokens of a
    ViT-small/8, the encoder that is transferred. The widths and the VC block are our reading of
    appendix A.1. (B, 3, S, S) -> (B, 1, S, S) logits, S = img_size, a multiple of 16."""

    def __init__(self, img_size):
        super().__init__()
        if img_size % 16:
            raise ValueError(f"vit_small needs a side that is a multiple of 16, not {img_size}: "
                             "prepare the data again, e.g. with --size 224")
        self.encoder = timm.create_model(BACKBONES["vit_small"], img_size=img_size, num_classes=0)
        self.stem = double_conv(3, 64)
        self.down = nn.ModuleList([double_conv(64, 128), double_conv(128, 256),
                                   double_conv(256, 512), double_conv(512, 512)])
        self.vc_conv = nn.Conv2d(384, 512, 1)                   # VC block
        self.vc_linear = nn.Linear(512, 512)
        self.up = nn.ModuleList([                               # of what is below, and the skip
            double_conv(1024 + 512, 256),
            double_conv(256 + 256, 128),
            double_conv(128 + 128, 64),
            double_conv(64 + 64, 64)])
        self.head = nn.Conv2d(64, 1, 1)
        for part in (self.stem, self.down, self.up, self.vc_conv):
            init_conv(part)

    def forward(self, x):
        skips = [self.stem(x)]                                  # (B, 64, S, S)
        for block in self.down:
            skips.append(block(F.max_pool2d(skips[-1], 2)))     # (B, 128, S/2) ... (B, 512, S/16)
        bottleneck = skips.pop()
        tokens = self.encoder.forward_features(x)[:, 1:]        # (B, (S/8)^2, 384), no class token
        tokens = tokens.transpose(1, 2)
        vc = tokens.unflatten(2, self.encoder.patch_embed.grid_size)
        vc = self.vc_conv(vc)                                   # (B, 512, S/8, S/8)
        vc = self.vc_linear(vc.movedim(1, 3)).movedim(3, 1)
        vc = F.interpolate(vc, size=bottleneck.shape[2:], mode="bilinear")
        y = torch.cat([bottleneck, vc], dim=1)                  # (B, 1024, S/16, S/16)
        for block in self.up:
            y = F.interpolate(y, scale_factor=2, mode="bilinear")
            y = block(torch.cat([y, skips.pop()], dim=1))       # (B, 256, S/8) ... (B, 64, S)
        return self.head(y)


def build_unet(backbone, img_size=224, encoder_depth=3):
    """A U-Net with random weights: (B, 3, H, W) float, ImageNet-normalised -> (B, 1, H, W) logits.
    backbone: "resnet50" (any H and W) or "vit_small" (H = W = img_size, a multiple of 16)."""
    if backbone not in BACKBONES or encoder_depth != 3:
        raise ValueError(f"no U-Net of {backbone!r} with encoder_depth {encoder_depth}: backbones "
                         "are resnet50 and vit_small, the depth is 3")
    return ResNet50UNet() if backbone == "resnet50" else ViTSmallUNet(img_size)


def _modules(names):
    """['layer3.0.a', 'layer3.1.b', 'fc.bias'] -> 'layer3, fc'."""
    return ", ".join(dict.fromkeys(name.split(".")[0] for name in names)) or "nothing"


def export_encoder(unet_or_backbone, path):
    """Write the encoder of a network, or a plain timm model, as a bare state dict in timm's names;
    print and return what timm's full model has beyond it (layer3, layer4, fc for our ResNet). Into
    that, and torchvision's `resnet50()`, it loads with strict=False and no unexpected name."""
    encoder = getattr(unet_or_backbone, "encoder", unet_or_backbone)
    state = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    timms = BACKBONES["vit_small" if "pos_embed" in state else "resnet50"]
    torch.save(state, path)
    with torch.device("meta"):
        names = timm.create_model(timms).state_dict().keys() - state.keys()
    missing = sorted(name for name in names if not name.endswith("num_batches_tracked"))
    print(f"encoder exported, {len(state)} tensors; timm's {timms} also has {_modules(missing)}")
    return missing


def read_encoder(path, backbone):
    """Return {timm's name: tensor} of the one encoder in a checkpoint, without wrappings such as
    {"state_dict": ...} and prefixes such as "module.backbone.". Raises as load_encoder."""
    if str(path) != "imagenet" and not Path(path).exists():
        raise ValueError(f"{path}: no such file")
    cause = "not a PyTorch or safetensors checkpoint that holds only weights"
    try:
        if str(path) == "imagenet":
            cause = "these weights could not be fetched"
            return timm.create_model(BACKBONES[backbone], pretrained=True).state_dict()
        with torch.serialization.safe_globals([argparse.Namespace]):    # DINO and timm save one
            if str(path).endswith(".safetensors"):
                file = timm.models.load_state_dict(path)
            else:
                file = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                  # torch and timm's hub raise a dozen kinds
        raise ValueError(f"{path}: {cause} ({type(error).__name__})") from None
    for key in ("state_dict", "model", "teacher"):
        if isinstance(file.get(key), dict):
            file = file[key]
    state = {str(name): value for name, value in file.items() if isinstance(value, torch.Tensor)}
    numbered = "4.0.conv1.weight"               # of a ResNet as a Sequential: RadImageNet, lightly
    for prefix in [n.removesuffix(numbered) for n in state if f".{n}".endswith(f".{numbered}")]:
        for number, child in SEQUENTIAL.items():
            for name in [n for n in state if n.startswith(f"{prefix}{number}.")]:
                state[name.replace(prefix + number, prefix + child, 1)] = state.pop(name)
    anchor = ANCHORS[backbone]
    prefixes = [n.removesuffix(anchor) for n in state if f".{n}".endswith(f".{anchor}")]
    if len(prefixes) != 1:
        raise ValueError(f"{path} must hold one {backbone} encoder, with a tensor {anchor}; but it "
                         f"holds {', '.join(prefixes or [*state][:3]) or 'no tensors'}")
    prefix = prefixes[0]                        # "", "module.", "backbone.", "encoder.", ...
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def load_encoder(unet, path):
    """Load an encoder into `unet.encoder`; print and return the names in the file that were not
    used. path: a checkpoint of ours, timm's or torchvision's, or "imagenet", timm's weights.
    Position embeddings of another image size are resampled. Raises ValueError, with the path, for a
    file that cannot be read, or whose weights are of another encoder or shape, or not finite."""
    own = unet.encoder.state_dict()
    backbone = next(b for b, anchor in ANCHORS.items() if anchor in own)
    state = read_encoder(path, backbone)
    for name, tensor in state.items():
        if name in own and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds values that are not finite")
    try:
        if "pos_embed" in own and "pos_embed" in state:
            grid = unet.encoder.patch_embed.grid_size
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid)
        missing, unused = unet.encoder.load_state_dict(state, strict=False)
    except RuntimeError as error:               # of other shapes; the first line only counts them
        raise ValueError(f"{path}: {str(error).splitlines()[-1].strip()}") from None
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the {len(own)} tensors of the "
                         f"{backbone} encoder, for example {missing[0]}")
    print(f"{path}: encoder loaded, {len(own)} tensors; not used: {_modules(unused)}")
    return unused
