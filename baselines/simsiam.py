"""SimSiam (Chen & He, CVPR 2021, arXiv:2011.10566). One file; torch, torchvision, timm.

    method = SimSiam("resnet50", img_size=224)
    views = method.augment(image)           # uint8 (3, H, W) -> two float views (3, 224, 224)
    loss = method(views)                    # each view batched: (B, 3, 224, 224) -> scalar, -1 to 1

Algorithm 1 and section 3 of the paper. Reference: facebookresearch/simsiam. `method.encoder` is a
plain timm ResNet-50.
"""

import math

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageFilter
from torchvision.transforms import v2


def blur(image):
    """A Pillow image, blurred with a sigma of .1 to 2 pixels."""
    sigma = torch.empty(()).uniform_(0.1, 2.0).item()
    return image.filter(ImageFilter.GaussianBlur(sigma))


def augmentation(img_size):
    """uint8 (3, H, W) -> float (3, S, S), ImageNet-normalised: MoCo v2's recipe, as in the paper's
    section 3.

    On gray images saturation, hue and grayscale do nothing; the published recipe keeps them.
    """
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    return v2.Compose([
        v2.ToPILImage(),
        v2.RandomResizedCrop(img_size, scale=(0.2, 1.0)),
        v2.RandomApply([jitter], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.Lambda(blur)], p=0.5),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])


def D(p, z):
    """Equation 1: negative cosine similarity, z without gradient (stop-gradient). (B, D) twice ->
    scalar in [-1, 1]."""
    return -F.cosine_similarity(p.float(), z.detach().float(), dim=1).mean()


class SimSiam(nn.Module):
    """One encoder, a projector f, a predictor h, and a stop-gradient."""

    backbones = ("resnet50",)
    keep_best = False                     # the loss says nothing about quality: run to the end

    def __init__(self, backbone="resnet50", img_size=224, batch_size=16, dim=2048, bottleneck=512):
        super().__init__()
        if backbone not in self.backbones:
            raise ValueError(f"SimSiam is published for {self.backbones[0]}, not for {backbone}: "
                             "its BatchNorm is part of it")
        if batch_size < 2:
            raise ValueError("SimSiam's BatchNorm needs at least 2 images a step")
        self.encoder = timm.create_model(backbone, num_classes=0)
        features = self.encoder.num_features
        self.projector = nn.Sequential(     # three layers, the last BatchNorm without affine
            nn.Linear(features, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(inplace=True),
            nn.Linear(features, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(inplace=True),
            nn.Linear(features, dim, bias=False),
            nn.BatchNorm1d(dim, affine=False))
        self.predictor = nn.Sequential(     # a bottleneck; no BatchNorm on its output
            nn.Linear(dim, bottleneck, bias=False),
            nn.BatchNorm1d(bottleneck),
            nn.ReLU(inplace=True),
            nn.Linear(bottleneck, dim))
        self.view = augmentation(img_size)
        self.lr = 0.05 * batch_size / 256   # .003125 at batch 16 (section 3)
        self.weight_decay = 1e-4

    def augment(self, image):
        """uint8 (3, H, W) -> two float views (3, S, S)."""
        return [self.view(image), self.view(image)]

    def forward(self, views):
        z1, z2 = [self.projector(self.encoder(view)) for view in views]     # (B, dim)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        self.z = z1.detach()
        return D(p1, z2) / 2 + D(p2, z1) / 2

    def optimizer(self):
        """SGD with momentum .9 (section 3)."""
        encoder = [*self.encoder.parameters(), *self.projector.parameters()]
        groups = [dict(params=encoder, cosine=True),
                  dict(params=list(self.predictor.parameters()), cosine=False)]
        return torch.optim.SGD(groups, self.lr, momentum=0.9, weight_decay=self.weight_decay,
                               fused=True)

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        """Cosine decay to 0, without warm-up; the predictor keeps its rate (section 4.2, table
        1c)."""
        rate = (1 + math.cos(math.pi * step / total_steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = self.lr * (rate if group["cosine"] else 1)

    def after_backward(self):
        """No clipping, nothing frozen."""

    def after_step(self, step, total_steps):
        """There is no moving average."""

    def health(self):
        """{"std": std of the normalised output z x sqrt(d)} (section 4.1): near 1 healthy, 0
        collapsed."""
        std = F.normalize(self.z.float(), dim=1).std(dim=0, unbiased=False).mean()
        return {"std": (std * self.z.shape[1] ** 0.5).item()}

    def samples(self, views):
        """{title: pictures (B, 3, S, S)}: what the network sees."""
        return {"view 1": views[0], "view 2": views[1]}
