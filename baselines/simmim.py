"""SimMIM: a Simple Framework for Masked Image Modeling (Xie et al., CVPR 2022, arXiv:2111.09886).
One file; torch, torchvision, timm.

    method = SimMIM("vit_small", img_size=224)
    views = method.augment(image)           # uint8 (3, H, W) -> [float view (3, 224, 224)]
    loss = method(views)                    # [(B, 3, 224, 224)] -> scalar, mean |error|, hidden

Section 3 of the paper; reference: microsoft/SimMIM. `method.encoder` is a plain timm ViT.
"""

import math

import timm
import torch
import torch.nn as nn
from torchvision.transforms import v2


def augmentation(img_size):
    """uint8 (3, H, W) -> float (3, S, S), ImageNet-normalised: random crop and flip alone (section
    4.1)."""
    return v2.Compose([
        v2.ToPILImage(),
        v2.RandomResizedCrop(img_size, scale=(0.67, 1.0), ratio=(3 / 4, 4 / 3)),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])


class SimMIM(nn.Module):
    """A ViT in which a learnt token stands for the hidden patches, and one linear layer that
    predicts their pixels."""

    backbones = ("vit_small",)
    keep_best = True                      # the loss is an error: the best is worth keeping

    def __init__(self, backbone="vit_small", img_size=224, batch_size=16, mask_ratio=0.6,
                 mask_patch=32):
        super().__init__()
        if backbone not in self.backbones:
            raise ValueError("SimMIM replaces patch tokens, which only a ViT has: take "
                             f"{self.backbones[0]}, not {backbone}")
        if img_size % 8:
            raise ValueError("SimMIM cuts images into patches of 8 pixels, and "
                             f"{img_size} is no multiple of that")
        self.encoder = timm.create_model("vit_small_patch8_224", img_size=img_size, num_classes=0)
        self.patch = 8
        self.side = img_size // 8
        # The 100-epoch recipe's 8e-4 at 2048 images, by the square-root rule: 7.1e-5 at batch 16.
        # By the linear rule 3.1e-6 (800-epoch recipe), no worse after fine-tuning: RESULTS.md.
        self.lr = 8e-4 * math.sqrt(batch_size / 2048)
        self.weight_decay = 0.05
        self.mask_ratio = mask_ratio
        self.mask_patch = mask_patch
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.encoder.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Sequential(nn.Conv2d(self.encoder.embed_dim, self.patch ** 2 * 3, 1),
                                  nn.PixelShuffle(self.patch))
        self.view = augmentation(img_size)

    def augment(self, image):
        """uint8 (3, H, W) -> [float view (3, S, S)]."""
        return [self.view(image)]

    def random_mask(self, batch, device=None):
        """60 % of the 32-pixel blocks, at random: bool (B, S/8, S/8), True = hidden. Where 32 does
        not divide the side, the last row and column of blocks are cut."""
        blocks = math.ceil(self.side * self.patch / self.mask_patch)
        count = math.ceil(blocks ** 2 * self.mask_ratio)
        order = torch.rand(batch, blocks ** 2, device=device).argsort(dim=1)
        mask = (order.argsort(dim=1) < count).view(batch, blocks, blocks)
        scale = self.mask_patch // self.patch
        mask = mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return mask[:, :self.side, :self.side]

    def pixels_of(self, mask):
        """bool (B, S/8, S/8) -> bool (B, 1, S, S): the hidden pixels."""
        return mask.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)[:, None]

    def reconstruct(self, images, mask):
        """(B, 3, S, S), bool (B, S/8, S/8) -> (B, 3, S, S): what the network makes of the images
        without the hidden."""
        vit = self.encoder
        patches = vit.patch_embed(images)                               # (B, N, 384)
        tokens = torch.where(mask.flatten(1)[..., None], self.mask_token, patches)
        cls = vit.cls_token.expand(len(images), -1, -1)
        tokens = torch.cat([cls, tokens], dim=1) + vit.pos_embed
        tokens = vit.norm(vit.blocks(tokens))[:, 1:]
        return self.head(tokens.transpose(1, 2).unflatten(2, (self.side, self.side)))

    def forward(self, views):
        images = views[0]
        mask = self.random_mask(len(images), images.device)
        pixels = self.pixels_of(mask)
        error = (self.reconstruct(images, mask) - images).abs() * pixels
        self.loss = error.sum() / pixels.sum() / 3      # L1 on hidden pixels, a mean (equation 1)
        hidden = images.permute(0, 2, 3, 1)[pixels[:, 0]]               # (values, 3)
        self.constant_error = (hidden - hidden.median(dim=0).values).abs().mean()
        return self.loss

    def optimizer(self):
        """AdamW, no weight decay on vectors, class token and positions (section 4.1 and
        the reference)."""
        decayed, others = [], []
        for name, p in self.named_parameters():
            is_decayed = p.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
            (decayed if is_decayed else others).append(p)
        groups = [dict(params=decayed, weight_decay=self.weight_decay),
                  dict(params=others, weight_decay=0.0)]
        return torch.optim.AdamW(groups, self.lr, fused=True)

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        """Linear warm-up over 10 % of the run (paper: 10 of 100 epochs), then cosine to 0."""
        warm = max(1, total_steps // 10)
        done = max(0, step - warm) / max(1, total_steps - warm)
        rate = min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = self.lr * rate

    def after_backward(self):
        """The norm of the gradient is cut at 5."""
        nn.utils.clip_grad_norm_(self.parameters(), 5.0)

    def after_step(self, step, total_steps):
        """There is no moving average."""

    def health(self):
        """{"error": L1 error on hidden pixels, over that of the best constant, one a channel}:
        1 = no structure learnt."""
        return {"error": (self.loss.detach() / self.constant_error).item()}

    @torch.no_grad()
    def samples(self, views):
        """{title: pictures (B, 3, S, S)}: image, what the network sees of it, what it predicts of
        the rest."""
        images = views[0]
        mask = self.random_mask(len(images), images.device)
        hidden = self.pixels_of(mask)
        reconstruction = torch.where(hidden, self.reconstruct(images, mask), images)
        return {"image": images, "masked": images * ~hidden, "reconstruction": reconstruction}
