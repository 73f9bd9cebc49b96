//! Dreamfeed: a daemon that dreams training data.

pub mod model;
pub mod synthesis;
/// The contract.
#[allow(missing_docs)]
pub mod proto {
    tonic::include_proto!("dreamfeed.v1");
}
