//! Networks: how they are described ([`spec`], [`graph`]), how they lie in files ([`checkpoint`], [`source`]), and how they
//! run on libtorch ([`network`]). This module knows nothing of synthesis.

pub mod augment;
pub mod channels;
pub mod checkpoint;
pub mod families;
pub mod generator;
pub mod golden;
pub mod graph;
pub mod labelled;
pub mod network;
pub mod operate;
pub mod pixels;
pub mod plan;
pub mod source;
pub mod spec;
pub mod train;
pub mod trainable;
