//! Whether images are wanted: synthesis burns a GPU, and need not do so for nobody.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Audience, Lag};
use crate::log::Log;

/// When to synthesize.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DemandMode {
    /// Always.
    #[default]
    Always,
    /// Only while somebody subscribes to fresh images and the foremost of them is nearly done with those that there are.
    Subscribers,
}

/// Why images are made, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// They always are.
    Always,
    /// A subscriber is nearly done with what there is.
    Wanted,
    /// Nobody subscribes to fresh images.
    NoSubscriber,
    /// Every subscriber has enough ahead of it.
    Lag,
    /// The storage takes none.
    Storage,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 5] = [Self::Always, Self::Wanted, Self::NoSubscriber, Self::Lag, Self::Storage];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::Wanted => "wanted",
            Self::NoSubscriber => "no_subscriber",
            Self::Lag => "lag",
            Self::Storage => "storage",
        }
    }

    /// Whether images are made for it.
    pub fn is_demand(self) -> bool {
        matches!(self, Self::Always | Self::Wanted)
    }
}

/// The demand for images of one log.
#[derive(Clone, Debug)]
pub struct Demand {
    mode: DemandMode,
    max_lag: u64,
    log: Arc<Log>,
    audience: Arc<Audience>,
}

impl Demand {
    /// `max_lag`: the images that the foremost subscriber may have ahead of it before synthesis rests.
    pub fn new(mode: DemandMode, max_lag: u64, log: Arc<Log>, audience: Arc<Audience>) -> Self {
        Self { mode, max_lag, log, audience }
    }

    /// What it is now.
    pub fn reason(&self) -> Reason {
        match self.mode {
            DemandMode::Always => Reason::Always,
            DemandMode::Subscribers => {
                let Lag { readers, min, .. } = self.audience.lag(self.log.extent().next_sequence);
                match readers {
                    0 => Reason::NoSubscriber,
                    _ if min < self.max_lag => Reason::Wanted,
                    _ => Reason::Lag,
                }
            }
        }
    }
}
