//! What each operation makes of shapes.
//!
//! Every extent and attribute is below 2^31 (see [`super::elements`] and the reader), so that a product of two and a few
//! sums fit i64 with room to spare, and no divisor is 0.

use super::{product, text};
use crate::model::graph::{Extent, MAX_SIZE, Op, Pad, PadMode, Reduce, Shape, Slice};
use Extent::{Batch, Fixed};

type Made = Result<(Shape, u64), String>;

/// The shape of the value that `op` makes of these, and its multiply-adds for one image; `of` tells shapes of its tensors.
pub fn shape<'a>(op: &Op, inputs: &[&Shape], of: &impl Fn(&str) -> &'a [usize]) -> Made {
    let x = inputs.first().copied().map_or(&[][..], Vec::as_slice);
    let y = inputs.get(1).copied().map_or(&[][..], Vec::as_slice);
    let free = |shape: Shape| Ok((shape, 0));
    match op {
        Op::Constant(op) => free(of(&op.value).iter().map(|size| Fixed(*size)).collect()),
        Op::Conv2d(op) => {
            let (channels, size) = map(x)?;
            let weight = of(&op.weight);
            let [out, per_group, kernel @ ..] = weight else { return Err(weight_is(weight, "[O, C/groups, h, w]")) };
            let kernel: [usize; 2] = kernel.try_into().map_err(|_| weight_is(weight, "[O, C/groups, h, w]"))?;
            if channels % op.groups != 0 || out % op.groups != 0 || *per_group != channels / op.groups {
                return Err(format!(
                    "{} is {weight:?}, but {channels} channels in {} groups come in; [O, {channels}/groups, h, w] is right, \
                     where groups divides O and {channels}",
                    op.weight, op.groups
                ));
            }
            vector(of, &op.bias, *out)?;
            let size = windows(size, kernel, op.stride, op.padding, op.dilation, false)?;
            let made = vec![x[0], Fixed(*out), Fixed(size[0]), Fixed(size[1])];
            let each = (per_group * kernel[0]) as u64;
            let cost = product(&made).saturating_mul(each).saturating_mul(kernel[1] as u64);
            Ok((made, cost))
        }
        Op::Linear(op) => {
            let (Some((last, rest)), &[out, inp]) = (x.split_last(), of(&op.weight)) else {
                return Err(weight_is(of(&op.weight), "[O, C]"));
            };
            if *last != Fixed(inp) {
                return Err(format!("{} is [{out}, {inp}], but {} comes in", op.weight, text(x)));
            }
            vector(of, &op.bias, out)?;
            let made = [rest, &[Fixed(out)]].concat();
            let cost = product(&made).saturating_mul(inp as u64);
            Ok((made, cost))
        }
        Op::BatchNorm(op) => {
            let [Batch(_), Fixed(channels), ..] = x else {
                return Err(format!("it takes [N, C, ...], but {} comes in", text(x)));
            };
            if x.len() > 5 {
                return Err(format!("it takes 2 to 5 dimensions, but {} comes in", text(x)));
            }
            for name in [&op.running_mean, &op.running_var].into_iter().chain(&op.weight).chain(&op.bias) {
                vector(of, &Some(name.clone()), *channels)?;
            }
            free(x.to_vec())
        }
        Op::LayerNorm(op) => {
            let shape: Shape = op.shape.iter().map(|size| Fixed(*size)).collect();
            if !x.ends_with(&shape) {
                return Err(format!("its shape is {}, but {} comes in", text(&shape), text(x)));
            }
            let wrong = op.weight.iter().chain(&op.bias).find(|name| of(name) != op.shape);
            match wrong {
                Some(name) => Err(format!("{name} is {:?}; {:?} is right", of(name), op.shape)),
                None => free(x.to_vec()),
            }
        }
        Op::GroupNorm(op) => {
            let [Batch(_), Fixed(channels), ..] = x else {
                return Err(format!("it takes [N, C, ...], but {} comes in", text(x)));
            };
            if channels % op.groups != 0 {
                return Err(format!("{channels} channels come in, which {} groups do not divide", op.groups));
            }
            vector(of, &op.weight, *channels)?;
            vector(of, &op.bias, *channels)?;
            free(x.to_vec())
        }
        Op::Activation(_) | Op::Affine(_) | Op::Dropout(_) => free(x.to_vec()),
        Op::Add(_) | Op::Mul(_) | Op::Div(_) => free(broadcast(x, y)?),
        Op::Reduce(op) => free(reduce(op, x)?),
        Op::Softmax(op) => {
            extent(x, op.dim)?;
            free(x.to_vec())
        }
        Op::Matmul(_) => matmul(x, y),
        Op::Attention(op) => attention(inputs, op.causal),
        Op::MaxPool2d(op) => {
            let (_, size) = map(x)?;
            half(op.padding, op.kernel)?;
            let size = windows(size, op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)?;
            free(sized(x, size))
        }
        Op::AvgPool2d(op) => {
            let (_, size) = map(x)?;
            half(op.padding, op.kernel)?;
            let size = windows(size, op.kernel, op.stride, op.padding, [1; 2], op.ceil_mode)?;
            free(sized(x, size))
        }
        Op::AdaptiveAvgPool2d(op) => map(x).and_then(|_| free(sized(x, op.size))),
        Op::Upsample(op) => map(x).and_then(|_| free(sized(x, op.size))),
        Op::Pad(op) => free(pad(op, x)?),
        Op::Reshape(op) => {
            one_batch(&op.shape)?;
            let batch = |shape: &[Extent]| shape.iter().any(|extent| matches!(extent, Batch(_)));
            if batch(x) != batch(&op.shape) || super::elements(x)? != super::elements(&op.shape)? {
                return Err(format!("{} comes in, which {} cannot hold", text(x), text(&op.shape)));
            }
            free(op.shape.clone())
        }
        Op::Permute(op) => {
            let mut seen = op.dims.clone();
            seen.sort_unstable();
            if seen != (0..x.len()).collect::<Vec<_>>() {
                return Err(format!("{} comes in, and dims is {:?}; each dimension once is right", text(x), op.dims));
            }
            free(op.dims.iter().map(|dim| x[*dim]).collect())
        }
        Op::Expand(op) => {
            one_batch(&op.shape)?;
            let fits = broadcast(x, &op.shape).is_ok_and(|made| made == op.shape);
            if fits { free(op.shape.clone()) } else { Err(format!("{} cannot become {}", text(x), text(&op.shape))) }
        }
        Op::Cat(op) => free(cat(op.dim, inputs)?),
        Op::Slice(op) => free(slice(op, x)?),
        Op::Roll(op) => {
            if op.dims.len() != op.shifts.len() {
                return Err(format!(
                    "it has {} dims and {} shifts; as many are right",
                    op.dims.len(),
                    op.shifts.len()
                ));
            }
            for dim in &op.dims {
                fixed(x, *dim)?;
            }
            free(x.to_vec())
        }
    }
}

fn weight_is(found: &[usize], right: &str) -> String {
    format!("its weight is {found:?}; {right} is right")
}

/// Channels, height and width.
fn map(x: &[Extent]) -> Result<(usize, [usize; 2]), String> {
    match x {
        [Batch(_), Fixed(channels), Fixed(height), Fixed(width)] => Ok((*channels, [*height, *width])),
        _ => Err(format!("it takes maps, [N, C, H, W], but {} comes in", text(x))),
    }
}

fn sized(x: &[Extent], size: [usize; 2]) -> Shape {
    [&x[..2], &size.map(Fixed)].concat()
}

fn vector<'a>(of: &impl Fn(&str) -> &'a [usize], name: &Option<String>, length: usize) -> Result<(), String> {
    match name.as_deref() {
        Some(name) if of(name) != [length] => Err(format!("{name} is {:?}; [{length}] is right", of(name))),
        _ => Ok(()),
    }
}

fn extent(x: &[Extent], dim: usize) -> Result<Extent, String> {
    x.get(dim).copied().ok_or_else(|| format!("dimension {dim} does not exist in {}", text(x)))
}

/// The size of a dimension that is not the batch's.
fn fixed(x: &[Extent], dim: usize) -> Result<usize, String> {
    match extent(x, dim)? {
        Fixed(size) => Ok(size),
        Batch(_) => Err(format!(
            "dimension {dim} of {} is the batch's, and images have nothing to do with each other",
            text(x)
        )),
    }
}

fn one_batch(shape: &[Extent]) -> Result<(), String> {
    let batches = shape.iter().filter(|extent| matches!(extent, Batch(_))).count();
    if batches > 1 {
        Err(format!("{} has the batch {batches} times; once at most is right", text(shape)))
    } else {
        Ok(())
    }
}

fn half(padding: [usize; 2], kernel: [usize; 2]) -> Result<(), String> {
    if (0..2).any(|i| padding[i] > kernel[i] / 2) {
        return Err(format!("padding is {padding:?}; at most half of the kernel, {kernel:?}, is right"));
    }
    Ok(())
}

/// How many windows fit, in height and width.
fn windows(
    size: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
    dilation: [usize; 2],
    ceil: bool,
) -> Result<[usize; 2], String> {
    let mut count = [0; 2];
    for i in 0..2 {
        let [n, k, s, p, d] = [size[i], kernel[i], stride[i], padding[i], dilation[i]].map(|each| each as i64);
        let room = n + 2 * p - d * (k - 1) - 1;
        let mut windows = (room + if ceil { s - 1 } else { 0 }).div_euclid(s) + 1;
        // The last window begins within the map or the padding before it.
        if ceil && (windows - 1) * s >= n + p {
            windows -= 1;
        }
        if room < 0 || windows < 1 {
            return Err(format!(
                "a window of {kernel:?} with dilation {dilation:?} is larger than a map of {size:?}"
            ));
        }
        count[i] = usize::try_from(windows).map_err(|e| e.to_string())?;
    }
    Ok(count)
}

/// PyTorch's: aligned at the end, an extent of 1 stretches.
fn broadcast(x: &[Extent], y: &[Extent]) -> Result<Shape, String> {
    let rank = x.len().max(y.len());
    let at = |shape: &[Extent], dim: usize| (dim + shape.len()).checked_sub(rank).map_or(Fixed(1), |dim| shape[dim]);
    let each = (0..rank).map(|dim| match (at(x, dim), at(y, dim)) {
        (a, b) if a == b => Some(a),
        (Fixed(1), other) | (other, Fixed(1)) => Some(other),
        _ => None,
    });
    let made: Option<Shape> = each.collect();
    let made = made.ok_or_else(|| format!("{} and {} do not go together", text(x), text(y)))?;
    one_batch(&made)?;
    Ok(made)
}

fn reduce(op: &Reduce, x: &[Extent]) -> Result<Shape, String> {
    if !op.dims.is_sorted_by(|a, b| a < b) {
        return Err(format!("dims is {:?}; ascending ones, each once, are right", op.dims));
    }
    for dim in &op.dims {
        fixed(x, *dim)?;
    }
    let each = x.iter().enumerate().filter_map(|(dim, extent)| match op.dims.contains(&dim) {
        true => op.keepdim.then_some(Fixed(1)),
        false => Some(*extent),
    });
    Ok(each.collect())
}

fn matmul(x: &[Extent], y: &[Extent]) -> Made {
    let wrong = || format!("{} and {} are no [..., L, E] and [..., E, M]", text(x), text(y));
    let ([before_x @ .., l, e], [before_y @ .., other, m]) = (x, y) else { return Err(wrong()) };
    if e != other || !matches!(e, Fixed(_)) {
        return Err(wrong());
    }
    let made = [broadcast(before_x, before_y)?, vec![*l, *m]].concat();
    one_batch(&made)?;
    let cost = product(&made).saturating_mul(e.at(1) as u64);
    Ok((made, cost))
}

fn attention(inputs: &[&Shape], causal: bool) -> Made {
    let [q, k, v, mask @ ..] = inputs else { return Err("it takes q, k and v".to_owned()) };
    let wrong =
        || format!("{}, {} and {} are no [..., L, E], [..., S, E] and [..., S, V]", text(q), text(k), text(v));
    let ([q_rest @ .., l, e], [k_rest @ .., s, k_e], [v_rest @ .., v_s, width]) =
        (q.as_slice(), k.as_slice(), v.as_slice())
    else {
        return Err(wrong());
    };
    if q_rest != k_rest || q_rest != v_rest || e != k_e || s != v_s || !matches!(e, Fixed(_)) {
        return Err(wrong());
    }
    let scores = [q_rest, &[*l, *s]].concat();
    one_batch(&scores)?;
    if let Some(mask) = mask.first() {
        if causal {
            return Err("it is causal and has a mask; one of the two is right".to_owned());
        }
        if broadcast(mask, &scores).as_ref() != Ok(&scores) {
            return Err(format!("its mask is {}, which cannot become {}", text(mask), text(&scores)));
        }
    }
    let cost = product(&scores).saturating_mul((e.at(1) + width.at(1)) as u64);
    let made = [q_rest, &[*l, *width]].concat();
    one_batch(&made)?;
    Ok((made, cost))
}

fn pad(op: &Pad, x: &[Extent]) -> Result<Shape, String> {
    if op.widths.len() != x.len() {
        return Err(format!(
            "{} comes in, and widths are {}; one pair a dimension is right",
            text(x),
            op.widths.len()
        ));
    }
    if op.mode != PadMode::Constant && op.value != 0.0 {
        return Err("value is 0 where the mode is not constant".to_owned());
    }
    let mut made = Shape::new();
    for (dim, [before, after]) in op.widths.iter().copied().enumerate() {
        if [before, after] == [0, 0] {
            made.push(x[dim]);
            continue;
        }
        let size = fixed(x, dim)? as i64;
        let total = size + before + after;
        // How far the mode can look into the dimension; what is cut at one end is no longer there for the other.
        let left = size + before.min(0) + after.min(0);
        let reach = match op.mode {
            PadMode::Constant | PadMode::Replicate => i64::MAX,
            PadMode::Reflect => left - 1,
            PadMode::Circular => left,
        };
        if total < 1 || left < i64::from(op.mode != PadMode::Constant) || before > reach || after > reach {
            return Err(format!("dimension {dim} of {} cannot be padded by {before} and {after}", text(x)));
        }
        match usize::try_from(total) {
            Ok(total) if total <= MAX_SIZE => made.push(Fixed(total)),
            _ => return Err(format!("dimension {dim} would have {total} elements; at most {MAX_SIZE} are allowed")),
        }
    }
    Ok(made)
}

fn cat(dim: usize, inputs: &[&Shape]) -> Result<Shape, String> {
    let mut made = inputs.first().map_or_else(Shape::new, |first| (*first).clone());
    let mut total = 0usize;
    for input in inputs {
        let size = fixed(input, dim)?;
        total = total.checked_add(size).filter(|total| *total <= MAX_SIZE).ok_or("the sum is too large")?;
        let other = |(at, extent): (usize, &Extent)| at != dim && made.get(at) != Some(extent);
        if input.len() != made.len() || input.iter().enumerate().any(other) {
            return Err(format!("{} and {} cannot be joined along dimension {dim}", text(&made), text(input)));
        }
    }
    *made.get_mut(dim).ok_or("nothing is joined")? = Fixed(total);
    Ok(made)
}

fn slice(op: &Slice, x: &[Extent]) -> Result<Shape, String> {
    let size = fixed(x, op.dim)?;
    if op.start >= op.end || op.end > size {
        return Err(format!("start is {} and end is {}; 0 <= start < end <= {size} is right", op.start, op.end));
    }
    let mut made = x.to_vec();
    made[op.dim] = Fixed((op.end - op.start).div_ceil(op.step));
    Ok(made)
}
