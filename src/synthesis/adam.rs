//! Adam (Kingma & Ba 2015) on single tensors.

use tch::Tensor;

/// Adam's state for one tensor.
#[derive(Debug)]
pub struct Adam {
    betas: [f64; 2],
    first: Tensor,
    second: Tensor,
    steps: i32,
}

impl Adam {
    /// For a tensor like `x`.
    pub fn new(x: &Tensor, betas: [f64; 2]) -> Self {
        Self { betas, first: x.zeros_like(), second: x.zeros_like(), steps: 0 }
    }

    /// One that goes on from [`Self::moments`] after `steps` steps.
    pub fn resume(betas: [f64; 2], moments: [Tensor; 2], steps: i32) -> Self {
        let [first, second] = moments;
        Self { betas, first, second, steps }
    }

    /// One that goes on from here, with memory of its own.
    pub fn copy(&self) -> Self {
        Self { first: self.first.copy(), second: self.second.copy(), ..*self }
    }

    /// The first and second moment, each shaped like the tensor.
    pub fn moments(&self) -> [&Tensor; 2] {
        [&self.first, &self.second]
    }

    /// Steps made.
    pub fn steps(&self) -> i32 {
        self.steps
    }

    /// Moves `x` against its gradient. Call without gradient tracking.
    pub fn step(&mut self, x: &mut Tensor, gradient: &Tensor, learning_rate: f64) {
        self.steps += 1;
        let [beta1, beta2] = self.betas;
        let _ = self.first.lerp_(gradient, 1.0 - beta1);
        let _ = self.second.lerp_(&gradient.square(), 1.0 - beta2);
        let correction1 = 1.0 - beta1.powi(self.steps);
        let correction2 = 1.0 - beta2.powi(self.steps);
        let denominator = (self.second.sqrt() / correction2.sqrt() + 1e-8) * (-correction1 / learning_rate);
        let _ = x.addcdiv_(&self.first, &denominator);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adam_is_adam() {
        // Values of torch.optim.Adam(lr=0.1) after two steps from 1.0 with gradients 0.5 and -0.25.
        let mut x = Tensor::from_slice(&[1.0f64]);
        let mut adam = Adam::new(&x, [0.9, 0.999]);
        adam.step(&mut x, &Tensor::from_slice(&[0.5f64]), 0.1);
        assert!((x.double_value(&[0]) - 0.900000002).abs() < 1e-12);
        adam.step(&mut x, &Tensor::from_slice(&[-0.25f64]), 0.1);
        assert!((x.double_value(&[0]) - 0.8733662987078463).abs() < 1e-12, "{}", x.double_value(&[0]));
    }
}
