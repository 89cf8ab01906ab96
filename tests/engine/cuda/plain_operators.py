"""The compiled operators' meaning in torch, so that the compiled step's order of kernels can be tested anywhere."""

from contextlib import contextmanager

import torch

from actsparse.engine.cuda.column_products import Epilogue
from actsparse.engine.cuda.row_products import Caps
from actsparse.engine.cuda.sums import ONE, to_sums
from actsparse.engine.step import gate_step, reference
from actsparse.engine.step.state import Best
from actsparse.engine.step.work import Chosen


def held(x):
    """Activations that may be sums in fixed point, as numbers."""
    return x.double() / ONE if x.dtype == torch.int64 else x


class PlainOperators:
    """Every method of `Operators`, by the reference; asserts what the kernels take for granted."""

    blocks = 4

    @contextmanager
    def chain(self):
        yield

    @contextmanager
    def aside(self):
        yield

    def fix(self, sums, values):
        sums.copy_(to_sums(values))

    def _product(self, x, weight, norm, bias):
        x = held(x)
        x = x.view(1, -1) if norm is None else reference.rms_norm(x.view(1, -1), norm.weight, norm.epsilon)
        return reference.project(weight, x, bias)[0]

    def project(self, out, x, weight, *, norm=None, bias=None):
        out.view(-1).copy_(self._product(x, weight, norm, bias))

    def add(self, out, x, weight, *, bias=None, scale=1.0):
        part = scale * self._product(x, weight, None, bias)
        out.view(-1).add_(to_sums(part) if out.dtype == torch.int64 else part)

    def gated(
        self, out, x, gate_up, *, norm, activation, bias=None, fill=None, mask=None, index=None, count=None, fresh=False
    ):
        gate, up = self._product(x, gate_up, norm, bias).chunk(2)
        neurons = reference.activate(gate, activation) * up
        neurons = neurons if fill is None else neurons - fill
        if index is not None:
            neurons = neurons[index.long()]
        neurons = neurons if mask is None else neurons * mask.view(-1)
        live = neurons.numel() if count is None else int(count)
        flat = out.view(-1)
        flat[:live] = neurons[:live]
        flat[live:] = torch.nan

    def threshold(self, out, x, weight, threshold, *, norm, activation, bias=None):
        value = reference.activate(self._product(x, weight, norm, bias), activation)
        out.copy_(reference.keep_large(value, threshold))

    def kept(self, out, x, weight, factor, *, norm, activation, bias=None, fill=None, read=None):
        factor = factor.view(-1)
        if read is not None:
            read += (factor != 0).sum()
        value = factor * reference.activate(self._product(x, weight, norm, bias), activation)
        out.view(-1).copy_(torch.where(factor != 0, value if fill is None else value - fill, 0.0))

    def head(self, logits, best, x, weight, *, norm, caps=None):
        scale, cap = caps or Caps()
        logits.view(-1).copy_(reference.soft_cap(self._product(x, weight, norm, None) * scale, cap or None))
        for block, part in enumerate(logits.view(-1).chunk(self.blocks)):
            best.value[0, block] = part.max()
            best.row[0, block] = part.argmax() + block * logits.view(-1).chunk(self.blocks)[0].numel()

    def columns(
        self,
        out,
        x,
        weight_rows,
        *,
        epilogue=Epilogue.WRITE,
        skip_zeros=False,
        threshold=None,
        segments=None,
        score=None,
        up=None,
        activation="identity",
        norm=None,
        squares=None,
        bias=None,
        fill=None,
        index=None,
        count=None,
        fresh=False,
        invert=False,
        keeps_nan=False,
        scale=1.0,
        zero=None,
        read=None,
    ):
        x = held(x).reshape(-1)
        if squares is not None:
            torch.testing.assert_close(squares.sum(), x.square().sum())
        if norm is not None:
            x = reference.rms_norm(x, norm.weight, norm.epsilon)
        if up is not None:
            x = reference.activate(x, activation) * held(up).reshape(-1)
        live = x.numel() if count is None else int(count)
        rows = weight_rows if index is None else weight_rows[index.long()]
        parts, kept = [], []
        for at, part in enumerate(rows.split(segments or (rows.shape[1],), dim=1)):
            size = x.abs() if score is None else x.abs() * score[at]
            least = threshold[at] if threshold is not None else size.new_zeros(())
            keep = (x != 0) & ((~(size < least) if keeps_nan else size >= least) != invert)
            kept.append(keep)
            parts.append(torch.where(keep, x if fill is None else x - fill, 0.0)[:live] @ reference.widen(part[:live]))
        y = torch.cat(parts)
        y = scale * (y if bias is None else y + bias)
        flat = out.view(-1)
        if out.dtype == torch.int64:
            flat.add_(to_sums(y))
        else:
            flat.copy_(y if epilogue is Epilogue.WRITE else flat + y)
        if zero is not None and zero.dtype == torch.int64:
            zero.zero_()
        if read is not None:
            read += torch.stack(kept).sum(dim=1)
        return torch.stack(kept)

    def top(self, threshold, x, tops, *, norm=None, score=None, up=None, activation="identity"):
        x = held(x).reshape(-1)
        x = x if norm is None else reference.rms_norm(x, norm.weight, norm.epsilon)
        x = x if up is None else reference.activate(x, activation) * held(up).reshape(-1)
        for rule, top in enumerate(tops):
            threshold[rule] = reference.top_threshold(x.abs() if score is None else x.abs() * score[rule], top)

    def scores(self, out, x, weight, *, norm=None, tanh=False):
        y = self._product(x, weight, norm, None)
        out.copy_(torch.tanh(y) if tanh else y)

    def choose(self, kept, score, top, *, sizes=None, members=None, always=None):
        mask = isinstance(kept, torch.Tensor)
        router = Chosen(second=score[:, None], top=top, site=None, sizes=sizes, members=members, always=always)
        neurons = kept.numel() if mask else kept.index.numel()
        chosen = gate_step.chosen(router, 0, {(None, 0): score.new_ones(1, 1)}, neurons)[0]
        if mask:
            kept.copy_(chosen)
            return
        found = chosen.nonzero()[:, 0].int()
        kept.index[: len(found)], kept.index[len(found) :] = found, -1
        kept.count.fill_(len(found))

    def merge(self, out, gate, up, activation):
        out.view(-1).copy_(reference.activate(gate, activation) * up)

    def attend(self, out, qkv, keys, values, *, position, angles, how, groups=None, padding=None):
        batch, kv_heads = keys.shape[:2]
        y = reference.attend(
            held(qkv).view(batch, -1), keys, values, position, angles.cosine, angles.sine, how, padding
        ).view(batch, kv_heads, -1)
        if groups is not None:
            y = y * (groups != 0)[:, None]
        out.copy_(y.flatten(1))

    def token(self, hidden, best, embedding, *, squares, forced, tokens, position, embed_scale=1.0):
        following = int(position) + 1
        for sequence, (value, row) in enumerate(zip(best.value, best.row, strict=True)):
            token = int(row[value == value.max()].min())
            if following < tokens.shape[1]:
                forced_token = int(forced[sequence, following])
                token = forced_token if forced_token >= 0 else token
                tokens[sequence, following] = token
            hidden[sequence] = reference.widen(embedding[token]) * embed_scale
        if following < tokens.shape[1]:
            position.fill_(following)
        squares[: len(hidden)] = hidden.square().sum(dim=1)

    def post_norm(self, hidden, branch, norm, *, squares, scale=1.0):
        hidden.add_(scale * reference.rms_norm(held(branch), norm.weight, norm.epsilon))
        squares[: len(hidden)] = hidden.square().sum(dim=1)
        if branch.dtype == torch.int64:
            branch.zero_()


class PlainBatchOperators(PlainOperators):
    """Every method of `BatchOperators`: each sequence by itself; asserts what those kernels take for granted."""

    def __init__(self, batch):
        self.batch = batch

    def project(self, out, x, weight, *, norm=None, bias=None):
        for of, one in zip(out, x, strict=True):
            if out.dtype == torch.int64:
                super().add(of, self._normed(one, norm), weight, bias=bias)
            else:
                super().project(of, one, weight, norm=norm, bias=bias)

    def _normed(self, x, norm):
        return x if norm is None else reference.rms_norm(held(x), norm.weight, norm.epsilon)

    def add(self, out, x, weight, *, bias=None, scale=1.0):
        assert out.dtype == torch.int64
        for of, one in zip(out, x, strict=True):
            super().add(of, one, weight, bias=bias, scale=scale)

    def gated(self, out, x, gate_up, *, mask=None, index=None, **how):
        assert index is None
        for sequence, (of, one) in enumerate(zip(out, x, strict=True)):
            super().gated(of, one, gate_up, mask=None if mask is None else mask[sequence], **how)

    def threshold(self, out, x, weight, threshold, **how):
        for of, one in zip(out, x, strict=True):
            super().threshold(of, one, weight, threshold, **how)

    def kept(self, out, x, weight, factor, *, read=None, **how):
        if read is not None:
            read += (factor != 0).any(dim=0).sum()
        for of, one, by in zip(out, x, factor, strict=True):
            super().kept(of, one, weight, by, **how)

    def head(self, logits, best, x, weight, *, norm, caps=None):
        for sequence, (of, one) in enumerate(zip(logits, x, strict=True)):
            mine = Best(best.value[sequence : sequence + 1], best.row[sequence : sequence + 1])
            super().head(of, mine, one, weight, norm=norm, caps=caps)

    def columns(self, out, x, weight_rows, *, up=None, index=None, squares=None, zero=None, read=None, **how):
        assert out.dtype == torch.int64
        assert index is None
        assert squares is None
        assert (x.dtype == torch.int64) == (up is not None) or how.get("norm") is not None
        kept = [
            super(PlainBatchOperators, self).columns(
                of, one, weight_rows, up=None if up is None else up[sequence], **how
            )
            for sequence, (of, one) in enumerate(zip(out, x, strict=True))
        ]
        if zero is not None:
            zero.zero_()
        if read is not None:
            read += torch.stack(kept).any(dim=0).sum(dim=1)
