//! The daemon, its tools and its library from outside: one binary, so that libtorch is linked once. A file is a subject;
//! `cargo test --release --test it pushing::` runs one of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

mod continual;
mod crash;
mod delivery;
mod faults;
mod identity;
mod lifecycle;
mod limits;
mod log_cli;
mod objective_golden;
mod outputs;
mod pruning;
mod pushing;
mod storage;
mod stores;
mod students;
mod subscriptions;
mod tiers;
mod training;
