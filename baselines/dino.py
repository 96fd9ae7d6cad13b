"""DINO: Emerging Properties in Self-Supervised Vision Transformers (Caron et al., ICCV 2021, arXiv:2104.14294).

    method = DINO("vit_small", img_size=224)
    views = method.augment(image)                   # uint8 (3, H, W) -> 2 global (3, 224, 224), 8 local (3, 96, 96)
    loss = method(views)                            # each view batched -> scalar; log(prototypes) when it knows nothing

Algorithm 1 and section 3; reference: facebookresearch/dino. torch, torchvision, timm; one file. `method.encoder` is
the student, a plain timm model (ViT-small patch 8 or ResNet-50).
"""

import copy
import math

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2


class Blur(v2.GaussianBlur):
    """torchvision's, as two products with banded matrices: equal to a gray level, a fifth of the time at 224."""

    def transform(self, image, params):
        k, sigma = self.kernel_size[0], params["sigma"][0]
        kernel = torch.softmax(-0.5 * ((torch.arange(k) - k // 2) / sigma) ** 2, 0)
        rows, columns = (F.pad(kernel, (n - 1, n - 1)).unfold(0, n + k - 1, 1).flip(0) for n in image.shape[1:])
        padded = F.pad(image.float(), (k // 2,) * 4, mode="reflect")
        return (rows @ padded @ columns.T).round_().to(torch.uint8)


def augmentation(size, scale, blur, solarize):
    """uint8 (3, H, W) -> float (3, size, size), ImageNet-normalised: BYOL's recipe with multi-crop (section 3.1).

    On gray images saturation, hue and grayscale do nothing. Solarisation inverts what is bright, on X-rays bones among
    it: the published recipe keeps it.
    """
    return v2.Compose([
        v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ToPILImage(), v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
                        v2.PILToTensor()], p=0.8),              # Pillow's hue is twice as fast
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([Blur(size // 20 * 2 + 1, sigma=(0.1, 2.0))], p=blur),
        v2.RandomSolarize(threshold=128, p=solarize),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])


class Head(nn.Module):
    """Three layers to 256 with GELU, l2 normalisation, prototypes of unit length (section 3.2 and appendix C).

    The BatchNorm is an option of the reference (use_bn_in_head, after both hidden layers), off there. A fresh ViT gives
    a thousand gray images nearly one and the same feature: without it the teacher of a short run never tells them apart.
    """

    def __init__(self, features, prototypes, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.GELU(),
                                 nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)
        for layer in (self.mlp[0], self.mlp[3], self.mlp[5]):
            nn.init.trunc_normal_(layer.weight, std=0.02), nn.init.zeros_(layer.bias)

    def last_layer(self):
        """Weight normalisation with its length fixed at 1: (prototypes, 256), unit rows."""
        return F.normalize(self.prototypes.weight, dim=1)

    def forward(self, x):
        return F.linear(F.normalize(self.mlp(x), dim=1), self.last_layer())


def dino_loss(student, teacher, center, student_temp, teacher_temp):
    """Cross-entropy of every student view against every other of the two teacher views (equation 3).

    student: (V, B, K), teacher: (2, B, K) for the first two of those views, center: (1, K) -> scalar.
    """
    log_p = F.log_softmax(student.float() / student_temp, dim=-1)
    q = F.softmax((teacher.float() - center) / teacher_temp, dim=-1)
    with torch.autocast(student.device.type, enabled=False):
        pairs = -torch.einsum("tbk,vbk->tv", q, log_p) / student.shape[1]               # (2, V)
    other = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)             # not the same view
    return pairs[other].mean()


class DINO(nn.Module):
    """A student that predicts, from any crop, what its moving average says of a global crop."""

    backbones, stops_early = ("vit_small", "resnet50"), False   # the loss says nothing about quality: run to the end

    def __init__(self, backbone="vit_small", img_size=224, batch_size=16, prototypes=1024, local_crops=8,
                 student_temp=0.1, teacher_temp=0.04, warmup_teacher_temp=0.04):
        super().__init__()
        if backbone not in self.backbones or backbone == "vit_small" and img_size % 8:
            raise ValueError("DINO takes resnet50, or vit_small, which cuts images into patches of 8 pixels, at a side that "
                             f"is a multiple of 8, not {backbone} at {img_size}")
        # The ViT resamples its positions for the smaller local crops.
        self.encoder = timm.create_model("resnet50", num_classes=0) if backbone == "resnet50" else timm.create_model(
            "vit_small_patch8_224", img_size=img_size, num_classes=0, dynamic_img_size=True)
        # 65536 prototypes there, for a million images; on a thousand most would never be used.
        self.head = Head(self.encoder.num_features, prototypes)
        self.teacher = copy.deepcopy(nn.Sequential(self.encoder, self.head)).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, prototypes))
        self.student_temp, self.teacher_temp, self.warmup_teacher_temp = student_temp, teacher_temp, warmup_teacher_temp
        self.temp, self.frozen = warmup_teacher_temp, False
        self.lr, self.weight_decay = 5e-4 * batch_size / 256, 0.4       # 3.1e-5 at batch 16 (section 3.2)
        local = max(16, img_size * 96 // 224 // 8 * 8)          # 96 at 224; a multiple of the patch
        self.views = (augmentation(img_size, (0.4, 1.0), 1.0, 0.0), augmentation(img_size, (0.4, 1.0), 0.1, 0.2),
                      *[augmentation(local, (0.05, 0.4), 0.5, 0.0)] * local_crops)

    def augment(self, image):
        return [view(image) for view in self.views]

    def forward(self, views):
        with torch.no_grad():
            teacher = torch.stack(self.teacher(torch.cat(views[:2])).chunk(2))          # (2, B, K)
        crops = [torch.cat(same) for same in (views[:2], views[2:]) if same]            # one pass a resolution
        student = torch.stack(self.head(torch.cat([self.encoder(x) for x in crops])).chunk(len(views)))     # (V, B, K)
        loss = dino_loss(student, teacher, self.center, self.student_temp, self.temp)
        self.q = F.softmax((teacher.float() - self.center) / self.temp, dim=-1).flatten(0, 1)
        if self.training:                                       # equation 4
            mean = teacher.float().mean(dim=(0, 1))[None]
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(mean)              # over the batches of all ranks
                mean /= torch.distributed.get_world_size()
            self.center = self.center.lerp(mean, 0.1)
        return loss

    def optimizer(self):
        """AdamW, weight decay on matrices only (section 3.2)."""
        groups = [dict(params=[p for p in self.parameters() if p.requires_grad and (p.ndim > 1) == matrix], decays=matrix)
                  for matrix in (True, False)]
        return torch.optim.AdamW(groups, self.lr, fused=True)

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        """Warm-up of lr over 10 % of the run (10 of 100 epochs there), cosine to 1e-6; cosine of the weight decay;
        the teacher's temperature rises over the first 30 %; prototypes stay frozen in epoch 1."""
        warm = max(1, total_steps // 10)
        down = (1 + math.cos(math.pi * max(0, step - warm) / max(1, total_steps - warm))) / 2
        lr = self.lr * (step + 1) / warm if step < warm else 1e-6 + (self.lr - 1e-6) * down
        decay = self.weight_decay * (1 - 0.9 * (1 + math.cos(math.pi * step / total_steps)) / 2)        # .04 -> .4
        for group in optimizer.param_groups:
            group |= dict(lr=lr, weight_decay=decay * group["decays"])
        share = min(1.0, step / max(1, 0.3 * total_steps))
        self.temp = self.warmup_teacher_temp + share * (self.teacher_temp - self.warmup_teacher_temp)
        self.frozen = step < epoch_steps

    def after_backward(self):
        """The gradient of every parameter is cut at norm 3; none reaches the prototypes in epoch 1."""
        for p in self.parameters():
            if p.grad is not None:
                nn.utils.clip_grad_norm_(p, 3.0)
        if self.frozen:
            self.head.prototypes.weight.grad = None

    def momentum(self, step, total_steps):
        """From m to 1 by a cosine; m = .996 (section 3.2) where the run is long, less where it is short, so that the
        teacher looks back over a tenth of the run at most: 1 - m = max(.004, 10 / steps), at most .2."""
        start = 1 - min(0.2, max(0.004, 10 / total_steps))
        return 1 - (1 - start) * (1 + math.cos(math.pi * step / total_steps)) / 2

    @torch.no_grad()
    def after_step(self, step, total_steps):
        """The teacher follows the student; BatchNorm's buffers are the teacher's own."""
        for target, source in zip(self.teacher.parameters(), [*self.encoder.parameters(), *self.head.parameters()]):
            target.lerp_(source, 1 - self.momentum(step, total_steps))

    def health(self):
        """Entropies of the teacher's output over log K: of its mean (0: all images on one prototype) and of single
        images (1: says nothing of any image). Healthy is mean high, single lower."""
        entropy = lambda p: (-(p * p.clamp_min(1e-30).log()).sum(dim=-1) / math.log(p.shape[-1])).mean().item()
        return {"entropy_mean": entropy(self.q.mean(dim=0)), "entropy_single": entropy(self.q)}

    def collapsed(self, health):
        """A line that says what to try, or None."""
        if health["entropy_mean"] < 0.1:
            return "the teacher gives every image to one prototype: try a smaller --lr"
        if health["entropy_single"] > 0.99:
            return "the teacher spreads every image over all prototypes alike: train longer, or try a larger --lr"

    def samples(self, views):
        """{title: pictures (B, 3, S, S)}: what the network sees."""
        return {"view 1": views[0], "view 2": views[1]}
