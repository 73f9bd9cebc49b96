//! Trainers: ordinary clients of the daemon, with no back door.

pub mod augment;
pub mod average;
pub mod distill;
pub mod feed;
pub mod progress;
pub mod replay;
pub mod sgd;
