//! The daemon's tasks, each under a name. None of them ends while the daemon serves: the first that does ends it.

use std::collections::HashMap;
use std::fmt::Display;

use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

/// What a task's end says of its cause.
pub(super) trait Cause {
    fn cause(self) -> String;
}

impl Cause for () {
    fn cause(self) -> String {
        "without a reason".into()
    }
}

impl<E: Display> Cause for Result<(), E> {
    fn cause(self) -> String {
        match self {
            Ok(()) => ().cause(),
            Err(error) => error.to_string(),
        }
    }
}

/// A task that ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub task: &'static str,
    pub cause: String,
}

/// Named tasks; aborted when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    set: JoinSet<String>,
    named: HashMap<Id, (&'static str, AbortHandle)>,
}

impl Tasks {
    /// Starts one.
    pub fn spawn<C: Cause>(&mut self, name: &'static str, task: impl Future<Output = C> + Send + 'static) {
        let handle = self.set.spawn(async move { task.await.cause() });
        self.named.insert(handle.id(), (name, handle));
    }

    /// The next one that ends; never where there is none. May be dropped at any time.
    pub async fn next_end(&mut self) -> Ended {
        match self.set.join_next_with_id().await {
            Some(ended) => self.ended(ended),
            None => std::future::pending().await,
        }
    }

    fn ended(&mut self, ended: Result<(Id, String), JoinError>) -> Ended {
        let (id, cause) = match ended {
            Ok(ended) => ended,
            Err(error) => (error.id(), error.to_string()),
        };
        let task = self.named.remove(&id).map_or("a task", |(name, _)| name);
        Ended { task, cause }
    }

    /// Waits until none of this name runs any more.
    pub async fn until_ended(&mut self, name: &str) {
        while self.named.values().any(|(other, _)| *other == name) {
            self.next_end().await;
        }
    }

    /// Ends those of this name.
    pub fn abort(&mut self, name: &str) {
        for (_, handle) in self.named.values().filter(|(other, _)| *other == name) {
            handle.abort();
        }
    }
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test]
    async fn whichever_ends_first_says_its_name_and_cause() {
        let mut tasks = Tasks::default();
        tasks.spawn("the one that goes on", pending::<()>());
        tasks.spawn("the gRPC server", async { Err::<(), _>("out of descriptors") });
        let ended = tasks.next_end().await;
        assert_eq!(ended, Ended { task: "the gRPC server", cause: "out of descriptors".into() });
        tasks.spawn("the append task", async { assert_eq!(1 + 1, 3, "arithmetic") });
        let ended = tasks.next_end().await;
        assert_eq!(ended.task, "the append task");
        assert!(ended.cause.contains("arithmetic"), "{}", ended.cause);
        tasks.abort("the one that goes on");
        tasks.until_ended("the one that goes on").await;
    }
}
