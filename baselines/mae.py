"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022, arXiv:2111.06377).
One file; torch, torchvision, timm.

    method = MAE("vit_small", img_size=224)
    views = method.augment(image)           # uint8 (3, H, W) -> [float view (3, 224, 224)]
    loss = method(views)                    # [(B, 3, 224, 224)] -> scalar, about 1 for a flat guess

Section 3 and appendix A; reference: facebookresearch/mae. `method.encoder` is a plain timm ViT.
"""

import math

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from timm.optim import param_groups_weight_decay
from torchvision.transforms import v2


def augmentation(img_size):
    """uint8 (3, H, W) -> float (3, S, S), normalised: crop and flip alone (appendix A.1)."""
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.Compose([
        v2.ToPILImage(),
        v2.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=bicubic),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])


def sincos_positions(dim, side):
    """Fixed 2-D positions with a zero row for the class token: (1, 1 + side^2, dim). Half of the
    channels encode the column, half the row, as sin and cos of position / 10000^(2i / (dim/2))."""
    exponent = torch.arange(dim // 4, dtype=torch.float64) / (dim / 4)
    omega = 1 / 10000 ** exponent
    places = torch.arange(side, dtype=torch.float64)
    row, column = torch.meshgrid(places, places, indexing="ij")
    parts = []
    for axis in (column, row):
        angle = axis.flatten()[:, None] * omega
        parts += [angle.sin(), angle.cos()]
    positions = torch.cat(parts, dim=1).float()
    return F.pad(positions, (0, 0, 1, 0))[None]


class MAE(nn.Module):
    """A ViT that sees a quarter of the patches, and a small decoder that predicts the others."""

    backbones = ("vit_small",)
    keep_best = True                      # the loss is an error: the best is worth keeping

    def __init__(self, backbone="vit_small", img_size=224, batch_size=16):
        super().__init__()
        if backbone not in self.backbones or img_size % 8:
            raise ValueError("MAE drops patches of 8 pixels, which only a ViT can do: take "
                             f"vit_small at a multiple of 8, not {backbone} at {img_size}")
        self.view = augmentation(img_size)
        vit = timm.create_model("vit_small_patch8_224", img_size=img_size, num_classes=0)
        self.encoder = vit
        positions = sincos_positions(vit.embed_dim, img_size // 8)
        vit.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_embed = nn.Linear(vit.embed_dim, 512)
        self.mask_token = nn.Parameter(torch.empty(1, 1, 512).normal_(std=0.02))
        self.register_buffer("decoder_positions", sincos_positions(512, img_size // 8))
        # timm's LayerNorm has the eps of the reference, 1e-6; torch's is 1e-5.
        blocks = [Block(512, 16, qkv_bias=True, norm_layer=LayerNorm) for _ in range(8)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = LayerNorm(512)
        self.head = nn.Linear(512, 3 * 8 * 8)
        # 9.4e-6 at batch 16 (appendix A.1); 1.5e-4, by the square root, did worse here
        self.lr = 1.5e-4 * batch_size / 256
        self.weight_decay = 0.05
        for module in self.modules():               # as in the reference: Xavier everywhere
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.detach().flatten(1))
        nn.init.normal_(vit.cls_token, std=0.02)

    def augment(self, image):
        """uint8 (3, H, W) -> [float view (3, S, S)]."""
        return [self.view(image)]

    def patchify(self, images):
        """(B, 3, S, S) -> (B, N, 3 * 8 * 8)."""
        return F.unfold(images, 8, stride=8).transpose(1, 2)

    def unpatchify(self, patches):
        """(B, N, 3 * 8 * 8) -> (B, 3, S, S)."""
        side = 8 * math.isqrt(patches.shape[1])
        return F.fold(patches.transpose(1, 2), side, 8, stride=8)

    def random_masking(self, tokens):
        """(B, N, D) -> the kept quarter (B, N/4, D), bool (B, N), True = hidden, and the order
        that restores."""
        noise = torch.rand(tokens.shape[:2], device=tokens.device)
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        keep = tokens.shape[1] // 4
        kept = torch.take_along_dim(tokens, shuffle[:, :keep, None], dim=1)
        return kept, restore >= keep, restore

    def encode(self, images):
        """The encoder on visible patches only: (B, 1 + N/4, 384), mask, restore."""
        vit = self.encoder
        tokens = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        kept, mask, restore = self.random_masking(tokens)
        cls = vit.cls_token + vit.pos_embed[:, :1]
        cls = cls.expand(len(images), -1, -1)
        tokens = torch.cat([cls, kept], dim=1)
        return vit.norm(vit.blocks(tokens)), mask, restore

    def decode(self, latent, restore):
        """Mask tokens put in, the order restored, every patch predicted: (B, N, 3 * 8 * 8)."""
        x = self.decoder_embed(latent)
        n_hidden = restore.shape[1] + 1 - x.shape[1]            # x has the class token, too
        hidden = self.mask_token.expand(len(x), n_hidden, -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        patches = torch.take_along_dim(patches, restore[..., None], dim=1)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_positions
        x = self.decoder_norm(self.decoder_blocks(x))
        return self.head(x)[:, 1:]

    def target(self, images):
        """Pixels, normalised patch by patch (section 4, "reconstruction target")."""
        patches = self.patchify(images)
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (var + 1e-6).sqrt()

    def forward(self, views):
        latent, mask, restore = self.encode(views[0])
        target = self.target(views[0])
        predicted = self.decode(latent, restore)
        error = ((predicted - target) ** 2).mean(dim=-1)        # (B, N)
        self.error = error[mask].mean()                     # of hidden patches only
        hidden = target[mask].unflatten(1, (3, 64))         # (patches, 3, 64)
        self.constant_error = hidden.var(dim=(0, 2), correction=0).mean()
        return self.error

    def optimizer(self):
        """AdamW (.9, .95), no weight decay on vectors (appendix A.1)."""
        groups = param_groups_weight_decay(self, self.weight_decay)
        return torch.optim.AdamW(groups, self.lr, betas=(0.9, 0.95), fused=True)

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        """Linear warm-up over 5 % of the run (paper: 40 of 800 epochs), then cosine to 0."""
        warm = max(1, total_steps // 20)
        lr = self.lr * (step + 1) / warm
        if step >= warm:
            done = (step - warm) / (total_steps - warm)
            lr = self.lr * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr

    def after_backward(self):
        """No clipping, nothing frozen."""

    def after_step(self, step, total_steps):
        """There is no moving average."""

    def health(self):
        """{"error": mean squared error on hidden patches, over that of the best constant colour}:
        1 = no structure learnt."""
        return {"error": (self.error / self.constant_error).item()}

    @torch.no_grad()
    def samples(self, views):
        """{title: pictures (B, 3, S, S)}: image, what the encoder sees, the reconstruction."""
        latent, mask, restore = self.encode(views[0])
        patches = self.patchify(views[0])
        hidden = mask[..., None]
        std, mean = torch.std_mean(patches, dim=-1, keepdim=True)
        predicted = self.decode(latent, restore) * std + mean   # each patch's own, as in the target
        return {
            "image": views[0],
            "masked": self.unpatchify(patches * ~hidden),
            "reconstruction": self.unpatchify(torch.where(hidden, predicted, patches))}
