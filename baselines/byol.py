"""BYOL: Bootstrap Your Own Latent (Grill et al., NeurIPS 2020, arXiv:2006.07733). One file; torch,
torchvision, timm.

    method = BYOL("resnet50", img_size=64)
    images = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8)      # yours
    optimizer, batches = method.optimizer(), images.split(16)
    for step, batch in enumerate(batches):
        method.before_step(optimizer, step, len(batches), len(batches))     # total, of an epoch
        views = zip(*[method.augment(image) for image in batch])            # two of each
        optimizer.zero_grad()
        method([torch.stack(view) for view in views]).backward()            # a scalar, 0 to 8
        method.after_backward()
        optimizer.step()
        method.after_step(step, len(batches))
    torch.save(method.encoder.state_dict(), "encoder.pth")

Any other method of baselines/ is trained by the same lines (MAE and SimMIM: vit_small). Equations
are the paper's; numbers that differ from its appendix A say why. Reference:
google-deepmind/deepmind-research byol (LARS, batch 4096). `method.encoder` is the online ResNet-50,
a plain timm model.
"""

import copy
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


def augmentation(img_size, blur_p, solarize_p):
    """uint8 (3, H, W) -> float (3, S, S), ImageNet-normalised (appendix B, table 6).

    On gray images saturation, hue and grayscale do nothing. Solarisation inverts bright pixels,
    such as bones on X-rays; it is kept, as published.
    """
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.Compose([
        v2.ToPILImage(),
        v2.RandomResizedCrop(img_size, scale=(0.08, 1.0), interpolation=bicubic),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([jitter], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.Lambda(blur)], p=blur_p),
        v2.RandomSolarize(threshold=128, p=solarize_p),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])


def mlp(in_features, hidden=4096, out_features=256):
    """The paper's projector and predictor: linear, BatchNorm, ReLU, linear (section 3.3)."""
    return nn.Sequential(
        nn.Linear(in_features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out_features))


def regression_loss(prediction, target):
    """Equation 2: 2 - 2 cos, a mean over the batch. (B, D) twice -> scalar in [0, 4]."""
    return (2 - 2 * F.cosine_similarity(prediction.float(), target.float(), dim=1)).mean()


class BYOL(nn.Module):
    """Online network (encoder, projector, predictor) and target network (their moving average,
    without predictor)."""

    backbones = ("resnet50",)
    keep_best = False                     # the loss says nothing about quality: run to the end

    def __init__(self, backbone="resnet50", img_size=224, batch_size=16, tau_base=0.97):
        super().__init__()
        if backbone not in self.backbones:
            raise ValueError(f"BYOL is published for {self.backbones[0]}, not for {backbone}: its "
                             "BatchNorm is part of it")
        if batch_size < 2:
            raise ValueError("BYOL's BatchNorm needs at least 2 images a step")
        self.encoder = timm.create_model(backbone, num_classes=0)
        self.projector = mlp(self.encoder.num_features)
        self.predictor = mlp(256)
        self.target = copy.deepcopy(nn.Sequential(self.encoder, self.projector))
        self.target.requires_grad_(False)
        self.tau_base = tau_base            # paper: .996 for 1000 epochs; .97 for short runs
        self.views = augmentation(img_size, 1.0, 0.0), augmentation(img_size, 0.1, 0.2)
        self.lr = 3e-4                      # LARS' .2 x batch / 256 does not learn at batch 16
        self.weight_decay = 1.5e-6

    def augment(self, image):
        """uint8 (3, H, W) -> two float views (3, S, S)."""
        return [view(image) for view in self.views]

    def forward(self, views):
        online = [self.projector(self.encoder(view)) for view in views]     # z_theta, (B, 256)
        with torch.no_grad():
            target = [self.target(view) for view in views]                  # z'_xi
        self.z = online[0].detach()
        first, second = [self.predictor(z) for z in online]                 # q_theta(z_theta)
        return regression_loss(first, target[1]) + regression_loss(second, target[0])

    def optimizer(self):
        """Adam; the paper's LARS is made for batches of 4096."""
        learning = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(learning, self.lr, weight_decay=self.weight_decay, fused=True)

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        """Linear warm-up over 1 % of the run (paper: 10 of 1000 epochs), then cosine to 0."""
        warm = max(1, total_steps // 100)
        done = max(0, step - warm) / max(1, total_steps - warm)
        rate = min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = self.lr * rate

    def after_backward(self):
        """No clipping, nothing frozen."""

    def tau(self, step, total_steps):
        """1 - (1 - tau_base) (cos(pi k / K) + 1) / 2 (section 3.3): from tau_base to 1."""
        return 1 - (1 - self.tau_base) * (math.cos(math.pi * step / total_steps) + 1) / 2

    @torch.no_grad()
    def after_step(self, step, total_steps):
        """xi <- tau xi + (1 - tau) theta, over parameters; BatchNorm's buffers are the target's."""
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        tau = self.tau(step, total_steps)
        for target, source in zip(self.target.parameters(), online, strict=True):
            target.lerp_(source, 1 - tau)

    def health(self):
        """{"std": std of the normalised projection x sqrt(d)}: near 1 healthy, 0 collapsed."""
        std = F.normalize(self.z.float(), dim=1).std(dim=0, unbiased=False).mean()
        return {"std": (std * self.z.shape[1] ** 0.5).item()}

    def samples(self, views):
        """{title: pictures (B, 3, S, S)}: what the network sees."""
        return {"view 1": views[0], "view 2": views[1]}
