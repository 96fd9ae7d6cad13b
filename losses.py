"""Losses for binary segmentation. One file, torch only: copy it.

    from losses import focal_tversky_loss
    loss = focal_tversky_loss(logits, target)       # both (B, 1, H, W), target in {0, 1}

Every loss takes logits (float, before the sigmoid) and target (any dtype, values 0 or 1) of one
shape, focal_cross_entropy of classes, and returns a scalar >= 0. Half-precision logits are raised
to float32: a sum over 16 x 224 x 224 pixels does not fit into float16.
"""

import torch
import torch.nn.functional as F


def _full_precision(logits, target):
    if logits.shape != target.shape:
        raise ValueError(f"logits {tuple(logits.shape)}, but target {tuple(target.shape)}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits, target.to(logits.dtype)


def tversky_index(logits, target, alpha=0.7, beta=0.3, smooth=1.0):
    """Soft Tversky index, a scalar in [0, 1] (Abraham & Khan 2019, eq. 3). alpha weighs false
    negatives, beta false positives. Sums run over the batch, so that an image without foreground
    does not weigh as much as one that is full of it."""
    logits, target = _full_precision(logits, target)
    p = torch.sigmoid(logits)
    tp = (p * target).sum()
    fn = ((1 - p) * target).sum()
    fp = (p * (1 - target)).sum()
    return (tp + smooth) / (tp + alpha * fn + beta * fp + smooth)


def focal_tversky_loss(logits, target, alpha=0.7, beta=0.3, gamma=4 / 3, smooth=1.0):
    """(1 - TI) ** (1 / gamma), the loss of MedSASS (section 3.3.4; Abraham & Khan 2019, eq. 4).
    Below one rounding step the power, whose slope is infinite at 0, is replaced by the straight
    line from the origin to it."""
    x = 1 - tversky_index(logits, target, alpha, beta, smooth)
    eps = torch.finfo(x.dtype).eps
    power = 1 / gamma
    return torch.where(x > eps, x.clamp_min(eps) ** power, x * eps ** (power - 1))


def tversky_loss(logits, target, alpha=0.7, beta=0.3, smooth=1.0):
    """1 - TI (Salehi et al. 2017)."""
    return 1 - tversky_index(logits, target, alpha, beta, smooth)


def focal_loss(logits, target, alpha=None, gamma=2.0):
    """Mean of alpha_t (1 - p_t) ** gamma * cross-entropy (Lin et al. 2017, eq. 5). alpha in [0, 1]
    weighs the foreground, 1 - alpha the background; None neither. gamma is 0 or at least 1."""
    logits, target = _full_precision(logits, target)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    # 1 - p_t, without cancellation
    p_wrong = torch.sigmoid(torch.where(target > 0.5, -logits, logits))
    loss = p_wrong ** gamma * cross_entropy
    if alpha is not None:
        loss = loss * (alpha * target + (1 - alpha) * (1 - target))
    return loss.mean()


def focal_cross_entropy(logits, target, gamma=2.0):
    """Focal loss over classes (Lin et al. 2017, eq. 4): logits (B, C), target int64 (B,)."""
    log_p = F.log_softmax(logits, dim=1).gather(1, target[:, None])[:, 0]
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def dice_loss(logits, target, smooth=1.0):
    """1 - (2 TP + 2 smooth) / (2 TP + FN + FP + 2 smooth) (Sudre et al. 2017): the Tversky loss at
    alpha = beta = .5, `smooth` as in segmentation_models_pytorch."""
    return 1 - tversky_index(logits, target, alpha=0.5, beta=0.5, smooth=smooth)


def bce_loss(logits, target):
    """Mean binary cross-entropy: the loss that collapses in appendix B.1."""
    return F.binary_cross_entropy_with_logits(*_full_precision(logits, target))


LOSSES = {                                                      # the values of --loss
    "focal_tversky": focal_tversky_loss,
    "tversky": tversky_loss,
    "focal": focal_loss,
    "dice": dice_loss,
    "bce": bce_loss,
}
