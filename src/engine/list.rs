//! Every engine of a daemon: one a device, and what they do together.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Engine, EngineState, EngineStatus};

/// Running engines.
#[derive(Debug)]
pub struct Engines(Vec<Engine>);

impl Engines {
    /// These.
    pub fn new(engines: Vec<Engine>) -> Self {
        Self(engines)
    }

    /// What they do, for other threads.
    pub fn statuses(&self) -> Statuses {
        Statuses(self.0.iter().map(|engine| engine.status.clone()).collect())
    }

    /// Waits for all threads to end, as [`Engine::join`] does for one; false where one takes longer than `within`.
    pub fn join(self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        let join = |engine: Engine| engine.join(deadline.saturating_duration_since(Instant::now()));
        // Every one is waited for, also behind one that did not end.
        let ended: Vec<bool> = self.0.into_iter().map(join).collect();
        ended.into_iter().all(|ended| ended)
    }
}

/// Every engine seen from other threads; no method waits for one. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Statuses(Arc<[Arc<EngineStatus>]>);

impl Statuses {
    /// What they do: the first of these that holds of any. Where one has failed the daemon does not do what it was started
    /// for, and while one is loading it does not yet.
    pub fn state(&self) -> EngineState {
        const ORDER: [EngineState; 6] = [
            EngineState::Failed,
            EngineState::Loading,
            EngineState::Synthesizing,
            EngineState::Blocked,
            EngineState::Resting,
            EngineState::Finished,
        ];
        let states: Vec<EngineState> = self.0.iter().map(|status| status.state()).collect();
        ORDER.into_iter().find(|state| states.contains(state)).unwrap_or(EngineState::Finished)
    }

    /// How long ago the one that is silent for longest last showed that it lives.
    pub fn heartbeat_age(&self) -> Duration {
        self.0.iter().map(|status| status.heartbeat_age()).max().unwrap_or_default()
    }

    /// Why one failed, where one did.
    pub fn failure(&self) -> Option<String> {
        self.0.iter().find_map(|status| status.failure())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_failed_or_loads_is_not_hidden_by_the_others() {
        let statuses: Vec<_> = (0..3).map(|_| Arc::new(EngineStatus::new())).collect();
        let all = Statuses(statuses.clone().into());
        for status in &statuses[..2] {
            status.enter(EngineState::Synthesizing);
        }
        assert_eq!(all.state(), EngineState::Loading);
        statuses[2].enter(EngineState::Resting);
        assert_eq!(all.state(), EngineState::Synthesizing);
        statuses[1].fail("no memory".into());
        assert_eq!((all.state(), all.failure()), (EngineState::Failed, Some("no memory".into())));
    }
}
