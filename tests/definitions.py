"""Merge rules written from their definitions, in NumPy, on dense updates."""

import numpy as np


def svd(x, rank=None):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    keep = int(np.sum(s > 1e-10 * s[0])) if rank is None else rank
    return u[:, :keep], s[:keep], vt[:keep].T


def polar(x):
    u, _, v = svd(x)
    return u @ v.T


def cut(x, rank):
    u, s, v = svd(x, rank)
    return u * s @ v.T


def weighed(x, inputs, ridge):
    """The update in coordinates in which norms are those of outputs, and left vectors of it."""
    _, _, v = svd(x)
    coordinates = [z @ v for z in inputs]
    grams = [z.T @ z / np.sum(z**2) for z in coordinates if z.any()]
    mean = sum(grams) * v.shape[1] / len(grams)
    values, turn = np.linalg.eigh((mean + ridge * np.eye(len(mean))) / (1 + ridge))
    return x @ v @ (turn * values**0.5) @ turn.T


def cut_by_outputs(x, inputs, rank, ridge):
    u, _, _ = np.linalg.svd(weighed(x, inputs, ridge), full_matrices=False)
    return u[:, :rank] @ u[:, :rank].T @ x


def tsv(updates, rank=None):
    us, ss, vs = zip(*(svd(x, rank) for x in updates), strict=True)
    return polar(np.hstack(us)) * np.concatenate(ss) @ polar(np.hstack(vs)).T


def cart(updates, rank, scale):
    mean = np.mean(updates, axis=0)
    return mean + scale * sum(cut(x - mean, rank) for x in updates)


def flatten(x, power):
    u, s, v = svd(x)
    return u * (s**power * s.sum() / (s**power).sum()) @ v.T


def iso_cts(updates, common, specific):
    u0, s0, v0 = svd(sum(updates), common)
    parts = [svd(x - u0 @ u0.T @ x, specific) for x in updates] + [(u0, s0, v0)]
    us, ss, vs = zip(*parts, strict=True)
    return np.concatenate(ss).mean() * polar(np.hstack(us)) @ polar(np.hstack(vs)).T


def svc(merged, updates, alpha=None):
    alpha = 1 / len(updates) if alpha is None else alpha
    u, s, v = svd(merged)
    gains = []
    for r in range(len(s)):
        row = u[:, r] @ merged
        shares = [row @ (u[:, r] @ x) / np.sum((u[:, r] @ x) ** 2) for x in updates]
        gains.append(len(updates) / sum(max(alpha, share) for share in shares))
    return u * (gains * s) @ v.T


def pico(loras, merge):
    b = np.hstack([lora.b for lora in loras])
    u, s, _ = svd(b)
    share = s**2 / np.sum(s**2)
    alpha = 1 / (1 + (len(loras) - 1) * share)
    calibrated = [lora.b @ lora.a - u * (1 - alpha) @ u.T @ lora.b @ lora.a for lora in loras]
    merged = merge(calibrated)
    mean = np.mean([np.linalg.norm(lora.b @ lora.a) for lora in loras])
    return merged * mean / np.linalg.norm(merged)


def dc_merge(updates, density, rho):
    us, ss, vs = zip(*(svd(x) for x in updates), strict=True)
    left, right = polar(np.hstack(us)), polar(np.hstack(vs))
    kept = []
    for u, s, v in zip(us, ss, vs, strict=True):
        shape = np.ones(len(s))
        if rho is not None:
            shape = np.linspace(min(rho, s[0] / s[-1]), 1, len(s))
        x = left.T @ (u * (s.sum() * shape / shape.sum()) @ v.T) @ right
        number = max(1, int(density * x.size))
        kept.append(np.where(np.abs(x) >= np.sort(np.abs(x).ravel())[-number], x, 0))
    kept = np.stack(kept)
    sign = np.sign(kept.sum(0))
    agrees = (np.sign(kept) == sign) & (sign != 0)
    mean = (kept * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
    owner = np.repeat(range(len(updates)), [len(s) for s in ss])
    return left @ (mean * (owner[:, None] == owner)) @ right.T


def prune(x, density):
    kept = int(density * x.size)
    threshold = np.sort(np.abs(x).ravel())[-kept - 1]
    return np.where(np.abs(x) >= threshold, x, 0)


def sce(updates, density):
    updates = np.stack(updates)
    variance = updates.var(0)
    number = int(density * np.sum(variance > 0))
    chosen = updates * (variance >= np.sort(variance.ravel())[-number])
    weights = np.mean(chosen**2, axis=(1, 2))
    weights = (weights / weights.sum())[:, None, None]
    agrees = weights * (np.sign(chosen) == np.sign(chosen.sum(0))) * (chosen != 0)
    total = agrees.sum(0)
    return (agrees * chosen).sum(0) / np.where(total > 0, total, 1)


def regmean(loras, inputs, ridge, weighting="iteris", orthogonalize=True, free=False):
    """On inputs ``(N, n)`` of each task, in the space of the adapters' rows, or of all rows."""
    updates = [lora.b @ lora.a for lora in loras]
    v = np.eye(updates[0].shape[1]) if free else svd(np.vstack([x.a for x in loras]))[2]
    weights = {
        "trace": [1 / np.sum((x @ v) ** 2) for x in inputs],
        "iteris": [
            np.sum(y**2) / np.sum((x @ y.T) ** 2) if y.any() else 0
            for x, y in zip(inputs, updates, strict=True)
        ],
        "none": np.ones(len(inputs)),
    }[weighting]
    grams = [w * (x @ v).T @ (x @ v) for w, x in zip(weights, inputs, strict=True)]
    level = ridge * np.trace(sum(grams)) / len(grams[0])
    targets = sum(y @ v @ k for y, k in zip(updates, grams, strict=True))
    merged = np.linalg.solve(sum(grams) + level * np.eye(len(grams[0])), targets.T).T
    if orthogonalize:
        values, vectors = np.linalg.eigh(sum(u @ u.T for u in (svd(x)[0] for x in updates)))
        kept = values > 1e-10
        merged = vectors[:, kept] / np.sqrt(values[kept]) @ vectors[:, kept].T @ merged
    return merged @ v.T
