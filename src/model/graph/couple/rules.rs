//! What each operation ties together. None everywhere means: more classes than are told apart.

use super::{Axis, Builder};
use crate::model::graph::{Extent, Op, Pad, PadMode};

/// The dimensions of the value that `op` makes of these, of this shape.
pub fn couple(
    builder: &mut Builder,
    op: &Op,
    inputs: &[(Vec<Axis>, &[Extent])],
    shape: &[Extent],
) -> Option<Vec<Axis>> {
    let x: Vec<Axis> = inputs.first().map(|(axes, _)| axes.clone()).unwrap_or_default();
    builder.named(x.iter().flatten().map(Vec::len).sum())?;
    match op {
        Op::Constant(op) => Some(builder.tensor(&op.value)),
        Op::Conv2d(op) => {
            let weight = builder.tensor(&op.weight);
            weight.iter().skip(2).for_each(|axis| builder.keep_whole(axis));
            let [Some(rows), columns, ..] = weight.as_slice() else { return Some(x) };
            if let Some(bias) = &op.bias {
                let bias = builder.tensor(bias);
                builder.tie(bias.first()?, &weight[0]);
            }
            grouped(builder, op.groups, x.get(1)?, rows, columns);
            Some(vec![x[0].clone(), Some(rows.clone()), None, None])
        }
        Op::Linear(op) => {
            let weight = builder.tensor(&op.weight);
            let (Some((last, rest)), [rows, columns]) = (x.split_last(), weight.as_slice()) else { return Some(x) };
            builder.tie(last, columns);
            if let Some(bias) = &op.bias {
                let bias = builder.tensor(bias);
                builder.tie(bias.first()?, rows);
            }
            Some(rest.iter().chain([rows]).cloned().collect())
        }
        Op::BatchNorm(op) => {
            for name in [&op.running_mean, &op.running_var].into_iter().chain(&op.weight).chain(&op.bias) {
                let tensor = builder.tensor(name);
                builder.tie(tensor.first()?, x.get(1)?);
            }
            Some(x)
        }
        Op::LayerNorm(op) => {
            let from = x.len().saturating_sub(op.shape.len());
            // Over several dimensions a channel is a part of a block of its weight, which is not told apart.
            if op.shape.len() > 1 {
                x[from..].iter().for_each(|axis| builder.keep_whole(axis));
            }
            for name in op.weight.iter().chain(&op.bias) {
                let tensor = builder.tensor(name);
                tensor.iter().zip(&x[from..]).for_each(|(own, axis)| builder.tie(own, axis));
            }
            Some(x)
        }
        Op::GroupNorm(op) => {
            for name in op.weight.iter().chain(&op.bias) {
                let tensor = builder.tensor(name);
                builder.tie(tensor.first()?, x.get(1)?);
            }
            if let Some(channels) = x.get(1)?.clone() {
                alike(builder, op.groups, &channels);
            }
            Some(x)
        }
        Op::Activation(_) | Op::Affine(_) | Op::Dropout(_) => Some(x),
        Op::Add(_) | Op::Mul(_) | Op::Div(_) => broadcast(builder, inputs, shape.len()),
        Op::Reduce(op) => {
            op.dims.iter().filter_map(|dim| x.get(*dim)).for_each(|axis| builder.keep_whole(axis));
            let axes = x.into_iter().enumerate().filter_map(|(dim, axis)| match op.dims.contains(&dim) {
                true => op.keepdim.then_some(None),
                false => Some(axis),
            });
            Some(axes.collect())
        }
        Op::Softmax(op) => {
            builder.keep_whole(x.get(op.dim)?);
            Some(x)
        }
        Op::MaxPool2d(_) | Op::AvgPool2d(_) | Op::AdaptiveAvgPool2d(_) | Op::Upsample(_) => {
            x.iter().skip(2).for_each(|axis| builder.keep_whole(axis));
            Some(vec![x[0].clone(), x.get(1)?.clone(), None, None])
        }
        Op::Pad(op) => pad(builder, op, x),
        Op::Reshape(_) => {
            let before = inputs.first().map_or(&[][..], |(_, shape)| shape);
            reshape(builder, x, before, shape)
        }
        Op::Permute(op) => Some(op.dims.iter().filter_map(|dim| x.get(*dim).cloned()).collect()),
        Op::Expand(_) => {
            let before = inputs.first().map_or(&[][..], |(_, shape)| shape);
            let new = shape.len().saturating_sub(x.len());
            let mut made = vec![None; new];
            for (dim, axis) in x.into_iter().enumerate() {
                let same = before.get(dim) == shape.get(dim + new);
                if !same {
                    builder.keep_whole(&axis);
                }
                made.push(axis.filter(|_| same));
            }
            Some(made)
        }
        Op::Cat(op) => cat(builder, op.dim, inputs),
        Op::Slice(op) => {
            let mut axes = x;
            if op.step > 1 {
                builder.keep_whole(axes.get(op.dim)?);
            }
            let kept = axes
                .get(op.dim)?
                .as_ref()
                .map(|ids| ids.iter().take(op.end).skip(op.start).step_by(op.step).copied().collect::<Vec<_>>());
            *axes.get_mut(op.dim)? = kept;
            Some(axes)
        }
        Op::Roll(op) => {
            op.dims.iter().filter_map(|dim| x.get(*dim)).for_each(|axis| builder.keep_whole(axis));
            Some(x)
        }
        // Heads, positions and products of two values: what comes out is whole, and so is what went in.
        Op::Matmul(_) | Op::Attention(_) => {
            inputs.iter().flat_map(|(axes, _)| axes).for_each(|axis| builder.keep_whole(axis));
            Some(vec![None; shape.len()])
        }
    }
}

/// A convolution in groups. Depthwise, a channel goes on as the channels that are made of it. Otherwise each group loses
/// what the others lose, or they would no longer be of one size.
fn grouped(builder: &mut Builder, groups: usize, x: &Axis, rows: &[usize], columns: &Axis) {
    let Some(per_group) = columns.as_ref().map(Vec::len) else { return };
    let Some(channels) = x else { return builder.keep_whole(columns) };
    if groups == 1 {
        return builder.tie(x, columns);
    }
    if per_group == 1 {
        builder.keep_whole(columns);
        let times = rows.len() / groups;
        for (row, made) in rows.iter().enumerate() {
            if let Some(channel) = channels.get(row / times) {
                builder.join(*channel, *made);
            }
        }
        return;
    }
    for part in channels.chunks(per_group) {
        builder.tie(&Some(part.to_vec()), columns);
    }
    alike(builder, groups, rows);
}

/// The same position in each of some equal parts is the same.
fn alike(builder: &mut Builder, parts: usize, ids: &[usize]) {
    let size = ids.len() / parts.max(1);
    for (index, id) in ids.iter().enumerate().skip(size) {
        builder.join(ids[index % size], *id);
    }
}

fn broadcast(builder: &mut Builder, inputs: &[(Vec<Axis>, &[Extent])], rank: usize) -> Option<Vec<Axis>> {
    let mut made = Vec::with_capacity(rank);
    for dim in 0..rank {
        let at = |(axes, shape): &(Vec<Axis>, &[Extent])| {
            let dim = (dim + axes.len()).checked_sub(rank)?;
            Some((axes.get(dim)?.clone(), *shape.get(dim)?))
        };
        let (x, y) = (inputs.first().and_then(at), inputs.get(1).and_then(at));
        made.push(match (x, y) {
            (Some((x, a)), Some((y, b))) if a == b => {
                builder.tie(&x, &y);
                x.and(y)
            }
            (Some((stretched, Extent::Fixed(1))), Some((axis, _))) | (Some((axis, _)), Some((stretched, _))) => {
                builder.keep_whole(&stretched);
                axis
            }
            (None, Some((axis, _))) | (Some((axis, _)), None) => axis,
            (None, None) => None,
        });
    }
    Some(made)
}

fn pad(builder: &mut Builder, op: &Pad, x: Vec<Axis>) -> Option<Vec<Axis>> {
    let mut made = Vec::with_capacity(x.len());
    for (axis, [before, after]) in x.into_iter().zip(op.widths.iter().copied()) {
        if [before, after] == [0, 0] {
            made.push(axis);
            continue;
        }
        let Some(ids) = axis.as_ref().filter(|_| op.mode == PadMode::Constant && before >= 0 && after >= 0) else {
            builder.keep_whole(&axis);
            made.push(None);
            continue;
        };
        let [front, back] = [before, after].map(|width| builder.fresh(usize::try_from(width).unwrap_or(0)));
        made.push(Some([front?.unwrap_or_default().as_slice(), ids, &back?.unwrap_or_default()].concat()));
    }
    Some(made)
}

fn cat(builder: &mut Builder, dim: usize, inputs: &[(Vec<Axis>, &[Extent])]) -> Option<Vec<Axis>> {
    let mut made = inputs.first()?.0.clone();
    let all: Option<Vec<&Vec<usize>>> = inputs.iter().map(|(axes, _)| axes.get(dim)?.as_ref()).collect();
    let joined: Axis = all.map(|all| all.into_iter().flatten().copied().collect());
    builder.named(joined.as_ref().map_or(0, Vec::len))?;
    for (axes, _) in inputs {
        for (at, axis) in axes.iter().enumerate() {
            if at != dim {
                builder.tie(axis, &made[at].clone());
                made[at] = made[at].clone().and(axis.clone());
            } else if joined.is_none() {
                builder.keep_whole(axis);
            }
        }
    }
    *made.get_mut(dim)? = joined;
    Some(made)
}

/// Dimensions that a reshape leaves alone go on; a channel that is flattened with what comes after it goes on as all that it
/// becomes; everything else is whole.
fn reshape(builder: &mut Builder, x: Vec<Axis>, before: &[Extent], after: &[Extent]) -> Option<Vec<Axis>> {
    let mut made = Vec::with_capacity(after.len());
    let (mut i, mut j) = (0, 0);
    while i < before.len() || j < after.len() {
        // The shortest stretches that have as many elements.
        let (from, to) = (i, j);
        let (mut a, mut b) = (1u64, 1u64);
        let mut batch = [false; 2];
        loop {
            let open = a != b || batch[0] != batch[1] || (i == from && j == to);
            if !open {
                break;
            }
            let take_before = i < before.len() && (j >= after.len() || a <= b && (i == from || a != b || !batch[0]));
            let (extent, total, has) = if take_before {
                i += 1;
                (before[i - 1], &mut a, &mut batch[0])
            } else if j < after.len() {
                j += 1;
                (after[j - 1], &mut b, &mut batch[1])
            } else {
                break;
            };
            *total = total.saturating_mul(extent.at(1) as u64);
            *has |= matches!(extent, Extent::Batch(_));
        }
        let (own, new) = (&x[from..i], &after[to..j]);
        let [Some(ids), rest @ ..] = own else {
            own.iter().for_each(|axis| builder.keep_whole(axis));
            made.extend(std::iter::repeat_n(None, j - to));
            continue;
        };
        let inner: usize = before[from + 1..i].iter().map(|extent| extent.at(1)).product();
        // A dimension of 1 beside it holds nothing.
        let mut parts = new.iter().enumerate().filter(|(_, extent)| **extent != Extent::Fixed(1));
        match (parts.next(), parts.next()) {
            (Some((at, Extent::Fixed(size))), None) if *size == ids.len().saturating_mul(inner) => {
                rest.iter().for_each(|axis| builder.keep_whole(axis));
                builder.named(*size)?;
                let each: Vec<usize> = ids.iter().flat_map(|id| std::iter::repeat_n(*id, inner)).collect();
                made.extend((0..new.len()).map(|dim| (dim == at).then(|| each.clone())));
            }
            _ => {
                own.iter().for_each(|axis| builder.keep_whole(axis));
                made.extend(std::iter::repeat_n(None, j - to));
            }
        }
    }
    Some(made)
}
