"""DINO: Emerging Properties in Self-Supervised Vision Transformers (Caron et al., ICCV 2021,
arXiv:2104.14294). One file; torch, torchvision, timm.

    method = DINO("vit_small", img_size=224)
    views = method.augment(image)   # uint8 (3, H, W) -> 2 global (3, 224, 224), 8 local (3, 96, 96)
    loss = method(views)            # each view batched -> scalar; log(prototypes) is chance

Reference: facebookresearch/dino. `method.encoder` is the teacher, a plain timm model.
"""

import copy
import math

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageFilter
from timm.optim import param_groups_weight_decay
from torchvision.transforms import v2


def blur(image):
    """A Pillow image, blurred with a sigma of .1 to 2 pixels."""
    return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2.0).item()))


def augmentation(size, scale, blur_p, solarize_p):
    """uint8 (3, H, W) -> float (3, size, size), ImageNet-normalised: BYOL's recipe with multi-crop
    (section 3.1). On gray images saturation, hue and grayscale do nothing."""
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return v2.Compose([
        v2.ToPILImage(),
        v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([jitter], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.Lambda(blur)], p=blur_p),
        v2.RandomSolarize(threshold=128, p=solarize_p),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])


class Head(nn.Module):
    """Three layers to 256 with GELU, l2 normalisation, prototypes of unit length (appendix C). The
    BatchNorm is an option of the reference (use_bn_in_head), off there: without it the teacher of a
    short run never tells gray images apart, as a fresh ViT's features hardly differ."""

    def __init__(self, features, prototypes, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        return F.linear(F.normalize(self.mlp(x), dim=1), F.normalize(self.prototypes.weight, dim=1))


def dino_loss(student, q):
    """Cross-entropy of every student view against every other of the two teacher views (equation
    3). student: logits (V, B, K), q: probabilities (2, B, K) of the first two -> scalar."""
    log_p = F.log_softmax(student.float() / 0.1, dim=-1)
    with torch.autocast(student.device.type, enabled=False):
        pairs = -torch.einsum("tbk,vbk->tv", q, log_p) / student.shape[1]   # (2, V)
    is_other = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs[is_other].mean()                   # a view is not compared with itself


class DINO(nn.Module):
    """A student that predicts, from any crop, what its moving average, the teacher, makes of a
    global crop. ViT-small and ResNet-50 have recipes of their own, as in the authors' README."""

    backbones = ("vit_small", "resnet50")
    keep_best = False                             # the loss says nothing about quality

    def __init__(self, backbone="vit_small", img_size=224, batch_size=16, prototypes=1024):
        super().__init__()
        if backbone not in self.backbones or backbone == "vit_small" and img_size % 8:
            raise ValueError("DINO takes resnet50, or vit_small (patches of 8 pixels) at multiples "
                             f"of 8, not {backbone} at {img_size}")
        self.is_vit = backbone == "vit_small"
        if self.is_vit:
            encoder = timm.create_model("vit_small_patch8_224", img_size=img_size, num_classes=0,
                                        dynamic_img_size=True)      # for the smaller local crops
            self.lr = 5e-4 * batch_size / 256       # 3.1e-5 at batch 16 (section 3.2)
            self.weight_decay = 0.4                 # at the end; a tenth of it at the beginning
            global_scale, local_scale = (0.4, 1.0), (0.05, 0.4)
        else:
            encoder = timm.create_model("resnet50", num_classes=0)
            self.lr = 0.03 * batch_size / 256       # 1.9e-3 at batch 16, of SGD
            self.weight_decay = 1e-4
            global_scale, local_scale = (0.14, 1.0), (0.05, 0.14)
        # 65536 in the paper, for a million images; on a thousand most would never be used.
        self.student = nn.Sequential(encoder, Head(encoder.num_features, prototypes))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, prototypes))
        self.is_frozen = False
        local = max(16, img_size * 96 // 224 // 8 * 8)      # 96 at 224; a multiple of the patch
        self.views = (augmentation(img_size, global_scale, 1.0, 0.0),
                      augmentation(img_size, global_scale, 0.1, 0.2),
                      *[augmentation(local, local_scale, 0.5, 0.0)] * 8)

    @property
    def encoder(self):
        return self.teacher[0]

    def augment(self, image):
        """uint8 (3, H, W) -> two global and eight local float views (3, S, S)."""
        return [view(image) for view in self.views]

    def forward(self, views):
        with torch.no_grad():
            teacher = torch.stack(self.teacher(torch.cat(views[:2])).chunk(2))      # (2, B, K)
        encoder, head = self.student
        features = [encoder(torch.cat(part)) for part in (views[:2], views[2:])]    # two sizes
        student = torch.stack(head(torch.cat(features)).chunk(len(views)))          # (V, B, K)
        # temperature .04, without the warm-up: the authors' default
        q = F.softmax((teacher.float() - self.center) / 0.04, dim=-1)
        self.q = q.flatten(0, 1)
        if self.training:                                   # equation 4
            mean = teacher.float().mean(dim=(0, 1))[None]
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(mean)  # over the batches of all ranks
                mean /= torch.distributed.get_world_size()
            self.center = self.center.lerp(mean, 0.1)
        return dino_loss(student, q)

    def optimizer(self):
        """ViT: AdamW, no weight decay on vectors (section 3.2). ResNet: SGD, momentum .9."""
        groups = param_groups_weight_decay(self.student, self.weight_decay)
        if self.is_vit:
            return torch.optim.AdamW(groups, self.lr, fused=True)
        return torch.optim.SGD(groups, self.lr, momentum=0.9)   # fused needs all gradients

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        """Warm-up of the rate over 10 % of the run (paper: 10 of 100 epochs), cosine to 1e-6."""
        warm = max(1, total_steps // 10)
        done = max(0, step - warm) / max(1, total_steps - warm)
        lr = 1e-6 + (self.lr - 1e-6) * (1 + math.cos(math.pi * done)) / 2
        if step < warm:
            lr = self.lr * (step + 1) / warm
        decay = self.weight_decay
        if self.is_vit:                             # .04 -> .4
            decay *= 1 - 0.9 * (1 + math.cos(math.pi * step / total_steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
            if group["weight_decay"]:
                group["weight_decay"] = decay
        self.is_frozen = step < epoch_steps

    def after_backward(self):
        """Every gradient is cut at norm 3; none reaches the prototypes in epoch 1."""
        for p in self.student.parameters():
            nn.utils.clip_grad_norm_(p, 3.0)
        if self.is_frozen:
            self.student[1].prototypes.weight.grad = None

    def momentum(self, step, total_steps):
        """From .996 to 1 by a cosine (section 3.2); in runs of less than 2500 steps from 1 - 10 /
        steps, at least .8, or the teacher would stay near its random start."""
        start = 1 - min(0.2, max(0.004, 10 / total_steps))
        return 1 - (1 - start) * (1 + math.cos(math.pi * step / total_steps)) / 2

    @torch.no_grad()
    def after_step(self, step, total_steps):
        """The teacher follows the student; BatchNorm's buffers are the teacher's own."""
        momentum = self.momentum(step, total_steps)
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for target, source in pairs:
            target.lerp_(source, 1 - momentum)

    def health(self):
        """Entropies of the teacher's output over log K: of its mean (0: all images on one
        prototype) and of single images (1: says nothing of any image)."""
        log_k = math.log(self.q.shape[-1])
        of_mean = torch.special.entr(self.q.mean(dim=0)).sum() / log_k
        single = torch.special.entr(self.q).sum(dim=-1).mean() / log_k
        return {"entropy_mean": of_mean.item(), "entropy_single": single.item()}

    def samples(self, views):
        """{title: pictures (B, 3, S, S)}: what the network sees."""
        return {"view 1": views[0], "view 2": views[1]}
