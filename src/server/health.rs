//! grpc.health.v1, kept in step with the engine.

use std::sync::Arc;
use std::time::Duration;

use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::context::{Context, Readiness};
use super::service::DreamfeedServer;

/// How soon a change of the engine's state shows. It is read from atomics, which wake nobody.
const POLL: Duration = Duration::from_millis(25);

const SERVICES: [&str; 2] = ["", <DreamfeedServer as NamedService>::NAME];

pub(super) async fn report(reporter: &HealthReporter, status: ServingStatus) {
    for service in SERVICES {
        reporter.set_service_status(service, status).await;
    }
}

/// Takes the names away, which ends every open Watch.
pub(super) async fn clear(reporter: &mut HealthReporter) {
    for service in SERVICES {
        reporter.clear_service_status(service).await;
    }
}

/// Follows the engine until the drain begins; a failure ends all open calls.
pub(super) async fn follow(context: Arc<Context>, reporter: HealthReporter) {
    let mut last = Readiness::Loading;
    loop {
        let now = context.readiness();
        if now != last {
            match &now {
                Readiness::Ready => {
                    tracing::info!("serving: ready");
                    report(&reporter, ServingStatus::Serving).await;
                }
                // A passing fault of the storage is no reason to end readers: /readyz and the metrics tell of it.
                Readiness::Storage(reason) => {
                    tracing::warn!("synthesis waits for the storage: {reason}");
                    report(&reporter, ServingStatus::Serving).await;
                }
                Readiness::Loading => report(&reporter, ServingStatus::NotServing).await,
                // The engine has logged it.
                Readiness::Failed(_) => {
                    report(&reporter, ServingStatus::NotServing).await;
                    context.closing.cancel();
                }
                Readiness::Draining => return,
            }
            last = now;
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            () = context.draining.cancelled() => return,
        }
    }
}
