//! The generator of the fast tier: latent vectors, and optionally classes, to images in 0..1 (the architecture of
//! Fang et al. 2022, FastDFKD), through libtorch's autograd.
//!
//! A linear layer onto a map of a quarter of the image's height and width, then twice: nearest-neighbour upsampling, a
//! 3x3 convolution, batch norm on the batch's own statistics, leaky ReLU; last a 3x3 convolution and a sigmoid.
//! Upsampling and convolution are one operation here, see [`upsampled_conv`].

use tch::{Device, Kind, Tensor};

use super::network::{BN_EPSILON, channels_last};
use super::source::Geometry;

/// The slope of the leaky ReLU below zero.
const LEAK: f64 = 0.2;

/// What decides the shapes of a generator's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneratorShape {
    /// The length of a latent vector.
    pub latent: usize,
    /// The classes it is told of as a one-hot vector beside the latent one; 0 = none.
    pub classes: usize,
    /// Channels of the last hidden map; the earlier ones have twice as many.
    pub width: usize,
    /// The images.
    pub geometry: Geometry,
}

impl GeneratorShape {
    /// The map that the linear layer makes: large enough that two upsamplings cover the image.
    fn base(&self) -> [usize; 2] {
        [self.geometry.height.div_ceil(4), self.geometry.width.div_ceil(4)]
    }

    /// Names and shapes of all parameters, in the order of [`Generator::parameters`].
    pub fn parameters(&self) -> Vec<(&'static str, Vec<i64>)> {
        let [height, width] = self.base();
        let [w, inner] = [self.width as i64, 2 * self.width as i64];
        let input = (self.latent + self.classes) as i64;
        vec![
            ("linear.weight", vec![inner * (height * width) as i64, input]),
            ("bn0.weight", vec![inner]),
            ("bn0.bias", vec![inner]),
            ("conv1.weight", vec![inner, inner, 3, 3]),
            ("bn1.weight", vec![inner]),
            ("bn1.bias", vec![inner]),
            ("conv2.weight", vec![w, inner, 3, 3]),
            ("bn2.weight", vec![w]),
            ("bn2.bias", vec![w]),
            ("conv3.weight", vec![self.geometry.channels as i64, w, 3, 3]),
            ("conv3.bias", vec![self.geometry.channels as i64]),
        ]
    }
}

/// A generator's shapes and parameters.
#[derive(Debug)]
pub struct Generator {
    shape: GeneratorShape,
    parameters: Vec<Tensor>,
}

impl Generator {
    /// Random parameters, PyTorch's defaults: uniform within one over the square root of the fan-in; batch norm at one and
    /// zero. Always drawn on the CPU, so that one seed means the same generator on every device.
    pub fn fresh(shape: GeneratorShape, device: Device) -> Self {
        let parameters = shape.parameters().iter().map(|(name, size)| fresh(name, size).to_device(device)).collect();
        Self { shape, parameters }
    }

    /// These parameters; None where they are not of this shape.
    pub fn with(shape: GeneratorShape, parameters: Vec<Tensor>) -> Option<Self> {
        let wanted = shape.parameters();
        let fits = wanted.len() == parameters.len()
            && wanted.iter().zip(&parameters).all(|((_, size), tensor)| *size == tensor.size());
        fits.then_some(Self { shape, parameters })
    }

    /// The shapes.
    pub fn shape(&self) -> GeneratorShape {
        self.shape
    }

    /// The parameters, in the order of [`GeneratorShape::parameters`].
    pub fn parameters(&self) -> &[Tensor] {
        &self.parameters
    }

    /// Starts its first layer, the linear one and its batch norm, anew.
    pub fn reset_first_layer(&mut self) {
        let shapes = self.shape.parameters();
        for (parameter, (name, size)) in self.parameters.iter_mut().zip(shapes).take(3) {
            *parameter = fresh(name, &size).to_device(parameter.device());
        }
    }

    /// A copy whose parameters require gradients.
    pub fn trainable_copy(&self) -> Self {
        let copy = |tensor: &Tensor| tensor.detach().copy().set_requires_grad(true);
        Self { shape: self.shape, parameters: self.parameters.iter().map(copy).collect() }
    }

    /// One with memory of its own, without gradients.
    pub fn copy(&self) -> Self {
        Self { shape: self.shape, parameters: self.parameters.iter().map(|p| p.detach().copy()).collect() }
    }

    /// The same parameters without gradients.
    pub fn frozen_copy(&self) -> Self {
        Self { shape: self.shape, parameters: self.parameters.iter().map(Tensor::detach).collect() }
    }

    /// Images `[N, C, H, W]` in 0..1 of latent vectors `[N, latent]` and, where it is told of classes, their one-hot
    /// vectors `[N, classes]`.
    pub fn forward(&self, latent: &Tensor, one_hot: Option<&Tensor>) -> Tensor {
        let [linear, s0, b0, conv1, s1, b1, conv2, s2, b2, conv3, bias3] = self.parameters.as_slice() else {
            unreachable!("a generator has the parameters of its shape")
        };
        let norm = |x: &Tensor, weight: &Tensor, bias: &Tensor| {
            x.batch_norm(Some(weight), Some(bias), None::<&Tensor>, None::<&Tensor>, true, 0.0, BN_EPSILON, true)
        };
        let [height, width] = self.shape.base();
        let input = match one_hot {
            Some(one_hot) => Tensor::cat(&[latent, one_hot], 1),
            None => latent.shallow_clone(),
        };
        // The linear layer's outputs are channels-last as they come.
        let map = input.linear(linear, None::<&Tensor>);
        let map = map.view([-1, height as i64, width as i64, s0.size()[0]]).permute([0, 3, 1, 2]);
        let h = norm(&map, s0, b0);
        let h = leaky_relu(&norm(&upsampled_conv(&h, conv1), s1, b1));
        let h = leaky_relu(&norm(&upsampled_conv(&h, conv2), s2, b2));
        let g = self.shape.geometry;
        h.conv2d(conv3, Some(bias3), [1, 1], [1, 1], [1, 1], 1)
            .narrow(2, 0, g.height as i64)
            .narrow(3, 0, g.width as i64)
            .sigmoid()
    }
}

fn fresh(name: &str, size: &[i64]) -> Tensor {
    let float = (Kind::Float, Device::Cpu);
    match (name.starts_with("bn"), name.ends_with("weight")) {
        (true, true) => Tensor::ones(size, float),
        (true, false) => Tensor::zeros(size, float),
        (false, true) => {
            let fan_in: i64 = size.iter().skip(1).product();
            let bound = 1.0 / (fan_in.max(1) as f64).sqrt();
            Tensor::empty(size, float).uniform(-bound, bound)
        }
        (false, false) => Tensor::zeros(size, float),
    }
}

fn leaky_relu(x: &Tensor) -> Tensor {
    // max(x, leak x) for a leak below one; libtorch's own takes no slope through tch.
    x.maximum(&(x * LEAK))
}

/// A 3x3 convolution, zero-padded, of `x [N, C, H, W]` upsampled to twice its size by nearest neighbour; without making
/// the large map: of the nine taps that reach one output pixel several fall onto the same input pixel, so that each of
/// the four kinds of output pixels (even or odd row and column) is a 2x2 convolution of `x`. That is 16 products
/// where there were 36.
pub fn upsampled_conv(x: &Tensor, weight: &Tensor) -> Tensor {
    let size = weight.size();
    let (out, channels) = (size[0], size[1]);
    // Rows 2i - 1, 2i, 2i + 1 of the large map are rows i - 1, i, i of the small one; 2i, 2i + 1, 2i + 2 are i, i, i + 1.
    let fold = |w: &Tensor, dim: i64| {
        let tap = |i: i64| w.narrow(dim, i, 1);
        let even = Tensor::cat(&[tap(0), tap(1) + tap(2)], dim);
        let odd = Tensor::cat(&[tap(0) + tap(1), tap(2)], dim);
        [even, odd]
    };
    let phases: Vec<Tensor> = fold(weight, 2).iter().flat_map(|rows| fold(rows, 3)).collect();
    let phases = Tensor::cat(&phases, 0);
    let conv = channels_last(x).conv2d(&channels_last(&phases), None::<&Tensor>, [1, 1], [1, 1], [1, 1], 1);
    let (n, h, w) = (x.size()[0], x.size()[2], x.size()[3]);
    debug_assert_eq!(conv.size(), [n, 4 * out, h + 1, w + 1], "{channels} channels");
    let phase = |row: i64, column: i64| {
        conv.narrow(1, (2 * row + column) * out, out).narrow(2, row, h).narrow(3, column, w).permute([0, 2, 3, 1])
    };
    let row = |row: i64| Tensor::stack(&[phase(row, 0), phase(row, 1)], 3).view([n, h, 1, 2 * w, out]);
    Tensor::cat(&[row(0), row(1)], 2).view([n, 2 * h, 2 * w, out]).permute([0, 3, 1, 2])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_upsampled_convolution_is_one_on_the_upsampled_map() {
        let _alone = crate::testing::drawing_alone();
        tch::manual_seed(3);
        let double = (Kind::Double, Device::Cpu);
        for (n, c, out, h, w) in [(2, 3, 4, 5, 6), (1, 1, 1, 1, 1), (3, 4, 2, 8, 7)] {
            let x = Tensor::randn([n, c, h, w], double).set_requires_grad(true);
            let weight = Tensor::randn([out, c, 3, 3], double).set_requires_grad(true);
            let large = x.upsample_nearest2d([2 * h, 2 * w], None, None);
            let wanted = large.conv2d(&weight, None::<&Tensor>, [1, 1], [1, 1], [1, 1], 1);
            let got = upsampled_conv(&x, &weight);
            assert_eq!(got.size(), wanted.size());
            let upstream = Tensor::randn(wanted.size(), double);
            let gradients =
                |y: &Tensor| Tensor::run_backward(&[(y * &upstream).sum(None)], &[&x, &weight], false, false);
            let close = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) < 1e-10;
            assert!(close(&got, &wanted));
            for (a, b) in gradients(&got).iter().zip(gradients(&wanted)) {
                assert!(close(a, &b));
            }
        }
    }

    #[test]
    fn images_have_the_size_that_was_asked_for() {
        let _alone = crate::testing::drawing_alone();
        for (channels, height, width) in [(3, 32, 32), (1, 8, 8), (1, 7, 9), (3, 5, 2)] {
            let shape =
                GeneratorShape { latent: 6, classes: 4, width: 3, geometry: Geometry { channels, height, width } };
            let generator = Generator::fresh(shape, Device::Cpu);
            let latent = Tensor::randn([5, 6], (Kind::Float, Device::Cpu));
            let one_hot = Tensor::from_slice(&[0i64, 1, 2, 3, 0]).one_hot(4).to_kind(Kind::Float);
            let images = generator.forward(&latent, Some(&one_hot));
            assert_eq!(images.size(), [5, channels as i64, height as i64, width as i64]);
            assert!(images.min().double_value(&[]) >= 0.0 && images.max().double_value(&[]) <= 1.0);
        }
    }
}
