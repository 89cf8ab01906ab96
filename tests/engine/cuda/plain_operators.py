"""The compiled operators' meaning in torch, so that the compiled step's order of kernels can be tested anywhere."""

from contextlib import contextmanager

import torch

from actsparse.engine.cuda.column_products import Epilogue
from actsparse.engine.cuda.row_products import Caps
from actsparse.engine.cuda.sums import ONE, to_sums
from actsparse.engine.step import gate_step, reference
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
        sums.copy_(to_sums(values.view(-1)))

    def _product(self, x, weight, norm, bias):
        x = held(x)
        x = x.view(1, -1) if norm is None else reference.rms_norm(x.view(1, -1), norm.weight, norm.epsilon)
        return reference.project(weight, x, bias)[0]

    def project(self, out, x, weight, *, norm=None, bias=None):
        out.view(-1).copy_(self._product(x, weight, norm, bias))

    def add(self, out, x, weight, *, bias=None, scale=1.0):
        part = scale * self._product(x, weight, None, bias)
        out.view(-1).add_(to_sums(part) if out.dtype == torch.int64 else part)

    def gated(self, out, x, gate_up, *, norm, activation, bias=None, fill=None, index=None, count=None, fresh=False):
        gate, up = self._product(x, gate_up, norm, bias).chunk(2)
        neurons = reference.activate(gate, activation) * up
        neurons = neurons if fill is None else neurons - fill
        if index is not None:
            neurons = neurons[index.long()]
        live = neurons.numel() if count is None else int(count)
        out.view(-1)[:live] = neurons[:live]
        out.view(-1)[live:] = torch.nan

    def threshold(self, out, x, weight, threshold, *, norm, activation, bias=None):
        value = reference.activate(self._product(x, weight, norm, bias), activation)
        out.copy_(reference.keep_large(value, threshold))

    def kept(self, out, x, weight, factor, *, norm, activation, bias=None, fill=None):
        value = factor * reference.activate(self._product(x, weight, norm, bias), activation)
        out.view(-1).copy_(torch.where(factor != 0, value if fill is None else value - fill, 0.0))

    def head(self, logits, best, x, weight, *, norm, caps=None):
        scale, cap = caps or Caps()
        logits.view(-1).copy_(reference.soft_cap(self._product(x, weight, norm, None) * scale, cap or None))
        for block, part in enumerate(logits.view(-1).chunk(self.blocks)):
            best.value[block] = part.max()
            best.row[block] = part.argmax() + block * logits.view(-1).chunk(self.blocks)[0].numel()

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
        scale=1.0,
        zero=None,
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
        parts = []
        for at, part in enumerate(rows.split(segments or (rows.shape[1],), dim=1)):
            size = x.abs() if score is None else x.abs() * score[at]
            keep = (x != 0) & ((size >= (threshold[at] if threshold is not None else 0.0)) != invert)
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

    def attend(self, out, qkv, keys, values, *, position, angles, how, groups=None):
        y = reference.attend(
            held(qkv).view(1, -1), keys[None], values[None], position, angles.cosine, angles.sine, how
        ).view(keys.shape[0], -1)
        if groups is not None:
            y = y * (groups != 0)[:, None]
        out.view(-1).copy_(y.flatten())

    def token(self, hidden, best, embedding, *, squares, forced, tokens, position, embed_scale=1.0):
        following = int(position) + 1
        top = best.value == best.value.max()
        token = int(best.row[top].min())
        if following < tokens.numel():
            forced_token = int(forced.view(-1)[following])
            token = forced_token if forced_token >= 0 else token
            tokens.view(-1)[following] = token
            position.fill_(following)
        hidden.view(-1).copy_(reference.widen(embedding[token]) * embed_scale)
        squares[0] = hidden.square().sum()

    def post_norm(self, hidden, branch, norm, *, squares, scale=1.0):
        normed = reference.rms_norm(branch.view(-1), norm.weight, norm.epsilon)
        hidden.view(-1).add_(scale * normed)
        squares[0] = hidden.square().sum()
