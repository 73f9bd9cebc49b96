//! Trainers: ordinary clients of the daemon, with no back door.

pub mod average;
pub mod distill;
pub mod feed;
mod files;
pub mod progress;
pub mod prune;
pub mod replay;
pub mod sgd;
