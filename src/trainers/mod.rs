//! Trainers: ordinary clients of the daemon, with no back door.

pub mod average;
pub mod continual;
pub mod distill;
pub mod dreams;
pub mod feed;
pub mod hints;
pub mod loss;
pub mod outputs;
pub mod progress;
pub mod prune;
pub mod replay;
pub mod sgd;
