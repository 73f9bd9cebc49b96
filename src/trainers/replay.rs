//! The images a trainer has received, kept to be drawn again: consumption outruns synthesis by far.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::client::{Batch, ClientError};

/// A ring of the newest images and the teacher's logits.
#[derive(Debug)]
pub struct ReplayBuffer {
    capacity: usize,
    images: Tensor,
    logits: Tensor,
    labels: Tensor,
    held: usize,
    next: usize,
}

/// Images drawn for one step.
#[derive(Debug)]
pub struct Drawn {
    /// u8 pixels, `[N, C, H, W]`.
    pub images: Tensor,
    /// The teacher's logits, `[N, K]`.
    pub logits: Tensor,
    /// The classes the images were made for, `[N]`.
    pub labels: Tensor,
}

impl ReplayBuffer {
    /// For at most `capacity` images of shape `[C, H, W]` and `num_classes` logits each, on a device. Memory is taken
    /// as images come.
    pub fn new(capacity: usize, shape: [usize; 3], num_classes: usize, device: Device) -> Self {
        let [c, h, w] = shape.map(|d| d as i64);
        Self {
            capacity: capacity.max(1),
            images: Tensor::zeros([0, c, h, w], (Kind::Uint8, device)),
            logits: Tensor::zeros([0, num_classes as i64], (Kind::Float, device)),
            labels: Tensor::zeros([0], (Kind::Int64, device)),
            held: 0,
            next: 0,
        }
    }

    /// Images held.
    pub fn len(&self) -> usize {
        self.held
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Adds a batch; the oldest images make room. A batch of another geometry or number of classes is refused.
    pub fn push(&mut self, batch: &Batch) -> Result<(), ClientError> {
        let (pixels, [c, h, w]) = batch.images()?;
        let (logits, classes) = batch.teacher_logits()?;
        let labels = batch.labels()?;
        let size = self.images.size();
        let shape = [c, h, w].map(|d| d as i64);
        if size[1..] != shape || self.logits.size()[1] != classes as i64 {
            return Err(ClientError::Contract {
                method: "Stream",
                problem: format!(
                    "images of {shape:?} with {classes} logits came, but Describe announced {:?} with {}",
                    &size[1..],
                    self.logits.size()[1]
                ),
            });
        }
        let images = Tensor::from_slice(pixels).view([batch.count as i64, shape[0], shape[1], shape[2]]);
        let logits = Tensor::from_slice(&logits).view([batch.count as i64, classes as i64]);
        let labels = Tensor::from_slice(&labels);
        let mut done = 0;
        while done < batch.count {
            if self.next >= self.images.size()[0] as usize {
                self.grow();
            }
            let room = self.images.size()[0] as usize - self.next;
            let (count, to) = (room.min(batch.count - done) as i64, self.next as i64);
            for (into, from) in [(&self.images, &images), (&self.logits, &logits), (&self.labels, &labels)] {
                into.narrow(0, to, count).copy_(&from.narrow(0, done as i64, count));
            }
            done += count as usize;
            self.next += count as usize;
            self.held = self.held.max(self.next);
            if self.next >= self.capacity {
                self.next = 0;
            }
        }
        Ok(())
    }

    /// Doubles the storage, up to the capacity.
    fn grow(&mut self) {
        let now = self.images.size()[0] as usize;
        let more = (now.max(512).min(self.capacity - now)) as i64;
        for tensor in [&mut self.images, &mut self.logits, &mut self.labels] {
            let mut size = tensor.size();
            size[0] = more;
            *tensor = Tensor::cat(&[&*tensor, &Tensor::zeros(size, (tensor.kind(), tensor.device()))], 0);
        }
    }

    /// Draws `count` images uniformly, each at most once where enough are held.
    pub fn draw(&self, count: usize, rng: &mut ChaCha8Rng) -> Drawn {
        let indices: Vec<i64> = if self.held >= count {
            rand::seq::index::sample(rng, self.held, count).into_iter().map(|index| index as i64).collect()
        } else {
            (0..count).map(|_| rng.random_range(0..self.held.max(1)) as i64).collect()
        };
        let indices = Tensor::from_slice(&indices).to_device(self.images.device());
        Drawn {
            images: self.images.index_select(0, &indices),
            logits: self.logits.index_select(0, &indices),
            labels: self.labels.index_select(0, &indices),
        }
    }
}
