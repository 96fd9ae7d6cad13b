"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022, arXiv:2111.06377). One file.

    method = MAE("vit_small", img_size=224)
    views = method.augment(image)                   # uint8 (3, H, W) -> [float view (3, 224, 224)]
    loss = method(views)                            # [(B, 3, 224, 224)] -> scalar, about 1 for a flat guess

Section 3 and appendix A; reference: facebookresearch/mae. torch, torchvision, timm. `method.encoder` is a plain timm ViT.
"""

import math

import timm
import torch
import torch.nn as nn
from timm.models.vision_transformer import Block
from torchvision.transforms import v2


def augmentation(img_size):
    """uint8 (3, H, W) -> float (3, S, S), ImageNet-normalised: random crop and flip alone (appendix A.1)."""
    return v2.Compose([
        v2.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])


def sincos_positions(dim, side):
    """Fixed 2-D positions with a zero row for the class token: (1, 1 + side^2, dim). Half of the channels encode the
    column, half the row; each is sin and cos of position / 10000^(2i / (dim/2))."""
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    parts = [f(axis.flatten()[:, None] * omega) for axis in (column, row) for f in (torch.sin, torch.cos)]
    return torch.cat([torch.zeros(1, dim), torch.cat(parts, dim=1).float()])[None]


class MAE(nn.Module):
    """A ViT that sees a quarter of the patches, and a small decoder that draws the others."""

    backbones, stops_early = ("vit_small",), True               # the loss is an error: the best is worth keeping

    def __init__(self, backbone="vit_small", img_size=224, batch_size=16, mask_ratio=0.75, width=512, depth=8, heads=16):
        super().__init__()
        if backbone not in self.backbones or img_size % 8:
            raise ValueError("MAE drops patches of 8 pixels, which only a ViT can do: take vit_small and a side that is "
                             f"a multiple of 8, not {backbone} at {img_size}")
        self.encoder = vit = timm.create_model("vit_small_patch8_224", img_size=img_size, num_classes=0)
        self.patch, self.side, self.mask_ratio, self.view = 8, img_size // 8, mask_ratio, augmentation(img_size)
        vit.pos_embed = nn.Parameter(sincos_positions(vit.embed_dim, self.side), requires_grad=False)
        self.decoder_embed = nn.Linear(vit.embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.register_buffer("decoder_positions", sincos_positions(width, self.side))
        self.decoder_blocks = nn.Sequential(*[Block(width, heads, qkv_bias=True) for _ in range(depth)])
        self.decoder_norm, self.head = nn.LayerNorm(width), nn.Linear(width, self.patch ** 2 * 3)
        self.lr, self.weight_decay = 1.5e-4 * batch_size / 256, 0.05    # 9.4e-6 at batch 16 (appendix A.1)
        for module in self.modules():                           # as in the reference: Xavier everywhere
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight), nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.detach().view(vit.embed_dim, -1))
        nn.init.normal_(vit.cls_token, std=0.02)

    def augment(self, image):
        return [self.view(image)]

    def patchify(self, images):
        """(B, 3, S, S) -> (B, N, 8 * 8 * 3)."""
        x = images.unflatten(3, (self.side, self.patch)).unflatten(2, (self.side, self.patch))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, patches):
        """(B, N, 8 * 8 * 3) -> (B, 3, S, S)."""
        x = patches.unflatten(1, (self.side, self.side)).unflatten(3, (self.patch, self.patch, 3))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def random_masking(self, tokens):
        """(B, N, D) -> the kept quarter (B, N/4, D), mask (B, N) with 1 = hidden, and the order that restores."""
        shuffle = torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1)
        restore, keep = shuffle.argsort(dim=1), int(tokens.shape[1] * (1 - self.mask_ratio))
        kept = torch.gather(tokens, 1, shuffle[:, :keep, None].expand(-1, -1, tokens.shape[2]))
        return kept, (restore >= keep).float(), restore

    def encode(self, images):
        """The encoder on visible patches only: (B, 1 + N/4, 384), mask, restore."""
        vit = self.encoder
        kept, mask, restore = self.random_masking(vit.patch_embed(images) + vit.pos_embed[:, 1:])
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        return vit.norm(vit.blocks(torch.cat([cls, kept], dim=1))), mask, restore

    def decode(self, latent, restore):
        """Mask tokens are put in, the order restored, every patch is predicted: (B, N, 8 * 8 * 3)."""
        x = self.decoder_embed(latent)
        hidden = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1).gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_positions
        return self.head(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]

    def target(self, images):
        """Pixels, normalised patch by patch (section 4, "reconstruction target")."""
        patches = self.patchify(images)
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (var + 1e-6).sqrt()

    def forward(self, views):
        latent, mask, restore = self.encode(views[0])
        error = ((self.decode(latent, restore) - self.target(views[0])) ** 2).mean(dim=-1)      # (B, N)
        self.error = (error * mask).sum() / mask.sum()          # on hidden patches only
        return self.error

    def optimizer(self):
        """AdamW (.9, .95), weight decay on matrices only (appendix A.1)."""
        groups = [dict(params=[p for p in self.parameters() if p.requires_grad and (p.ndim > 1) == matrix],
                       weight_decay=self.weight_decay * matrix) for matrix in (True, False)]
        return torch.optim.AdamW(groups, self.lr, betas=(0.9, 0.95), fused=True)

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        """Linear warm-up over 5 % of the run (40 of 800 epochs there), then cosine to 0."""
        warm = max(1, total_steps // 20)
        decay = (1 + math.cos(math.pi * max(0, step - warm) / max(1, total_steps - warm))) / 2
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (step + 1) / warm) * decay

    def after_backward(self): """No clipping, nothing frozen."""        # noqa: E704
    def after_step(self, step, total_steps): """No moving average."""   # noqa: E704
    def collapsed(self, health): """A reconstruction does not collapse: never a warning."""     # noqa: E704

    def health(self):
        """{"error": mean squared error on hidden patches, over that of a flat guess (1)}: below 1 it has learnt."""
        return {"error": self.error.item()}

    @torch.no_grad()
    def samples(self, views):
        """{title: pictures (B, 3, S, S)}: image, what the encoder sees of it, what the decoder draws of the rest."""
        latent, mask, restore = self.encode(views[0])
        patches, hidden = self.patchify(views[0]), mask[..., None] == 1
        std, mean = torch.std_mean(patches, dim=-1, keepdim=True)
        drawn = self.decode(latent, restore) * std + mean       # each patch's own mean and contrast, as in the target
        return {"image": views[0], "masked": self.unpatchify(patches * ~hidden),
                "reconstruction": self.unpatchify(torch.where(hidden, drawn, patches))}
