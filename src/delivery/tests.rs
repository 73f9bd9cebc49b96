#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use half::f16;
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::log::Retention;
use crate::log::tests::{batch, filled, open_in};
use crate::model::checkpoint::Checkpoint;
use crate::model::source::Normalization;

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(future)
}

async fn delivery(counts: &[usize]) -> Arc<Delivery> {
    delivery_of(filled(counts, Retention::default()).await)
}

fn delivery_of(log: Arc<Log>) -> Arc<Delivery> {
    let normalization = Normalization { mean: vec![0.5], std: vec![0.25] };
    Delivery::new(log, &normalization, watch::channel(None).1, Flight::new(1 << 30, 1))
}

/// The sequences that a message's pixels spell.
fn spelled(message: &Message) -> Vec<u64> {
    let file = Checkpoint::parse(message.payload.clone()).unwrap();
    let tensor = file.get("images").unwrap();
    assert_eq!(tensor.shape, [message.count as usize, 1, 2, 4]);
    let data = tensor.data.to_vec();
    let spelled: Vec<u64> = data.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
    if let Some(sequence) = file.get("sequence") {
        let told: Vec<u64> = sequence.data.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        assert_eq!(told, spelled);
        let labels: Vec<u64> =
            file.get("labels").unwrap().data.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        assert_eq!(labels, spelled.iter().map(|s| s % 3).collect::<Vec<_>>());
        let logits = file.get("teacher_logits").unwrap().data.as_chunks::<4>().0.to_vec();
        let firsts: Vec<f32> = logits.iter().step_by(3).map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(firsts, spelled.iter().map(|s| *s as f32).collect::<Vec<_>>());
    }
    spelled
}

/// Everything that a subscription has without waiting.
async fn drain(subscription: &mut Subscription) -> Vec<Message> {
    let mut messages = Vec::new();
    // Time is paused: it passes only once nothing else can happen.
    while let Ok(next) = tokio::time::timeout(Duration::from_secs(1), subscription.next()).await {
        messages.push(next.unwrap());
    }
    messages
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever the number of ranks, the batch size and the classes, every wanted image comes exactly once over all ranks
    /// and in order in each; and a rank that resumes from any message, even under another number of ranks, goes on there.
    #[test]
    fn shards_see_every_image_once_and_resume_where_they_were(
        counts in prop::collection::vec(1usize..9, 1..10),
        ranks in 1u32..6,
        batch_size in prop::option::of(1usize..7),
        classes in prop::option::of(prop::collection::btree_set(0u32..3, 1..3)),
        stop_after in 0usize..5,
    ) {
        run(async {
            let delivery = delivery(&counts).await;
            let total = counts.iter().sum::<usize>() as u64;
            let classes = classes.map(Arc::new);
            let wanted = |s: &u64| classes.as_ref().is_none_or(|c| c.contains(&((s % 3) as u32)));
            let mut all = Vec::new();
            for index in 0..ranks {
                let shard = Shard { index, count: ranks };
                let policy = Policy { shard, batch_size, classes: classes.clone(), ..Policy::default() };
                let mut first = delivery.subscribe(0, policy.clone());
                let mut seen = Vec::new();
                for _ in 0..stop_after {
                    match tokio::time::timeout(Duration::from_secs(1), first.next()).await {
                        Ok(message) => seen.extend(spelled(&message.unwrap())),
                        Err(_) => break,
                    }
                }
                let mut resumed = delivery.subscribe(first.resume_from(), policy);
                for message in drain(&mut resumed).await {
                    prop_assert_eq!(message.count, message.fresh_count);
                    if let Some(size) = batch_size {
                        prop_assert_eq!(message.count as usize, size);
                    }
                    seen.extend(spelled(&message));
                }
                let mut expected: Vec<u64> = (0..total).filter(|s| shard.has(*s) && wanted(s)).collect();
                if let Some(size) = batch_size {
                    // What fills no whole batch waits for more.
                    expected.truncate(expected.len() / size * size);
                }
                prop_assert_eq!(&seen, &expected);
                all.extend(seen);
            }
            all.sort_unstable();
            let before = all.len();
            all.dedup();
            prop_assert_eq!(before, all.len());
            Ok(())
        })?;
    }

    /// With replay every message is full, its share is kept while fresh images wait, and fresh ones come once, in order.
    #[test]
    fn replay_fills_messages_and_keeps_its_share(
        counts in prop::collection::vec(1usize..9, 1..10),
        share in 0.05f64..1.0,
        batch_size in 1usize..20,
        start in 0.0f64..1.0,
    ) {
        run(async {
            let delivery = delivery(&counts).await;
            let total = counts.iter().sum::<usize>() as u64;
            let start = (start * total as f64) as u64;
            let policy = Policy {
                replay: Replay { share, sampling: Sampling::Uniform },
                batch_size: Some(batch_size),
                ..Policy::default()
            };
            let mut subscription = delivery.subscribe(start, policy);
            let (mut fresh, mut sent) = (Vec::new(), 0u64);
            let messages = 3 * total as usize / batch_size + 60;
            for turn in 1..=messages {
                let message = subscription.next().await.unwrap();
                prop_assert_eq!(message.count as usize, batch_size);
                let spelled = spelled(&message);
                prop_assert!(spelled.iter().all(|s| *s < total));
                fresh.extend(spelled.iter().take(message.fresh_count as usize).copied());
                sent += u64::from(message.count);
                let ratio = 1.0 - fresh.len() as f64 / sent as f64;
                prop_assert!((message.replay_ratio - ratio).abs() < 1e-9);
                let due = (1.0 - share) * batch_size as f64 * turn as f64;
                prop_assert!(fresh.len() as f64 <= due + 1.0 + 1e-6);
                if start + (fresh.len() as u64) < total {
                    prop_assert!(fresh.len() as f64 >= due - 1.0 - 1e-6, "{} of {due}", fresh.len());
                }
            }
            prop_assert_eq!(fresh.clone(), (start..start + fresh.len() as u64).collect::<Vec<_>>());
            Ok(())
        })?;
    }
}

/// How often each image is drawn, in draws of the real size.
fn frequencies(sampling: Sampling, classes: Option<BTreeSet<u32>>) -> (Vec<f64>, Vec<Arc<crate::log::Entry>>) {
    run(async {
        let counts = [40, 3, 17, 8, 60, 1, 31];
        let delivery = delivery(&counts).await;
        let table = delivery.table(sampling, classes.clone().map(Arc::new).as_ref());
        table.follow(delivery.log()).await;
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut seen = BTreeMap::<u64, u64>::new();
        let draws = 60_000;
        for _ in 0..draws {
            let first = table.draw(&mut random).unwrap().entry.summary.first_sequence;
            let chunk = delivery.log().load(first).await.unwrap();
            for row in draw_rows(&chunk, sampling, ROWS_PER_DRAW, classes.as_ref(), &mut random) {
                *seen.entry(first + u64::from(row)).or_default() += 1;
            }
        }
        let total = counts.iter().sum::<usize>() as u64;
        let drawn: u64 = seen.values().sum();
        assert_eq!(drawn, draws * ROWS_PER_DRAW as u64);
        let frequency = |s| seen.get(&s).copied().unwrap_or(0) as f64 / drawn as f64;
        ((0..total).map(frequency).collect(), delivery.log().news(0, usize::MAX).entries)
    })
}

fn assert_proportional(frequencies: &[f64], weights: &[f64]) {
    let sum: f64 = weights.iter().sum();
    for (sequence, (found, weight)) in frequencies.iter().zip(weights).enumerate() {
        let expected = weight / sum;
        // 60,000 draws of eight; rows of one draw hang together, so five times the deviation of independent draws of one.
        let bound = 5.0 * (expected / 60_000.0).sqrt() + 1e-9;
        assert!((found - expected).abs() < bound, "image {sequence}: {found} of {expected} (within {bound})");
    }
}

#[test]
fn uniform_sampling_takes_every_image_alike() {
    let (found, _) = frequencies(Sampling::Uniform, None);
    assert_proportional(&found, &vec![1.0; found.len()]);
    let (found, _) = frequencies(Sampling::Uniform, Some(BTreeSet::from([1])));
    let weights: Vec<f64> = (0..found.len()).map(|s| if s % 3 == 1 { 1.0 } else { 0.0 }).collect();
    assert_proportional(&found, &weights);
}

#[test]
fn competition_sampling_is_proportional_to_the_divergence_at_birth() {
    let weight = |s: usize| (s % 64) as f64 / 100.0 + COMPETITION_FLOOR;
    let (found, _) = frequencies(Sampling::Competition, None);
    assert_proportional(&found, &(0..found.len()).map(weight).collect::<Vec<_>>());
    let (found, _) = frequencies(Sampling::Competition, Some(BTreeSet::from([0, 2])));
    let weights: Vec<f64> = (0..found.len()).map(|s| if s % 3 == 1 { 0.0 } else { weight(s) }).collect();
    assert_proportional(&found, &weights);
}

#[test]
fn recency_sampling_halves_with_every_quarter_of_the_log() {
    let (found, entries) = frequencies(Sampling::Recency, None);
    let total = found.len() as f64;
    let mut weights = Vec::new();
    for entry in entries {
        let middle = (entry.summary.first_sequence + entry.summary.end()) as f64 / 2.0;
        weights.extend(vec![0.5f64.powf((total - middle) / (total / 4.0)); entry.summary.count as usize]);
    }
    assert_proportional(&found, &weights);
}

#[test]
fn without_replay_a_message_waits_until_it_is_full() {
    run(async {
        let delivery = delivery(&[3]).await;
        let policy = Policy { batch_size: Some(5), ..Policy::default() };
        let mut subscription = delivery.subscribe(0, policy);
        assert!(drain(&mut subscription).await.is_empty());
        // A half-full message must not look like a reader that has enough.
        assert_eq!(delivery.audience().lag(3), Lag { readers: 1, min: 0, max: 0 });
        let log = delivery.log().clone();
        log.append(&Arc::new(batch(3, 4))).await.unwrap();
        let message = subscription.next().await.unwrap();
        assert_eq!((spelled(&message), message.position), (vec![0, 1, 2, 3, 4], 5));
        drop(subscription);
        assert_eq!(delivery.audience().lag(7).readers, 0);
    });
}

#[test]
fn a_log_without_images_makes_even_replay_wait() {
    run(async {
        let delivery = delivery(&[]).await;
        let replay = Replay { share: 1.0, sampling: Sampling::Competition };
        let policy = Policy { replay, batch_size: Some(4), ..Policy::default() };
        let mut subscription = delivery.subscribe(0, policy);
        assert!(drain(&mut subscription).await.is_empty());
        delivery.log().append(&Arc::new(batch(0, 2))).await.unwrap();
        let message = subscription.next().await.unwrap();
        assert_eq!((message.count, message.fresh_count, message.replay_ratio), (4, 0, 1.0));
    });
}

#[test]
fn stale_images_are_passed_over_and_counted() {
    run(async {
        let delivery = delivery(&[4, 4]).await;
        // The images of these logs are years old.
        let staleness = Staleness { max_age: Some(Duration::from_secs(60)), ..Staleness::default() };
        let policy = Policy { staleness, ..Policy::default() };
        let mut subscription = delivery.subscribe(0, policy.clone());
        assert!(drain(&mut subscription).await.is_empty());
        let mut young = batch(8, 4);
        young.created_at = SystemTime::now();
        delivery.log().append(&Arc::new(young)).await.unwrap();
        let message = subscription.next().await.unwrap();
        assert_eq!((spelled(&message), message.stale_images), (vec![8, 9, 10, 11], 8));
        // Replay keeps to the bound too.
        let replay = Replay { share: 1.0, sampling: Sampling::Uniform };
        let mut subscription = delivery.subscribe(0, Policy { replay, batch_size: Some(32), ..policy });
        for _ in 0..10 {
            assert!(spelled(&subscription.next().await.unwrap()).iter().all(|s| *s >= 8));
        }
    });
}

#[test]
fn images_without_a_student_never_go_stale_by_version() {
    let bound = Staleness { max_student_versions: Some(2), max_age: None };
    let now = SystemTime::now();
    assert!(!bound.exceeded(0, now, 1000, now));
    assert!(!bound.exceeded(5, now, 7, now));
    assert!(bound.exceeded(5, now, 8, now));
    assert!(!bound.exceeded(5, now, 3, now));
}

#[test]
fn normalized_pixels_are_what_the_teacher_sees() {
    run(async {
        let delivery = delivery(&[3]).await;
        let bytes: Vec<u8> = (0u64..3).flat_map(u64::to_le_bytes).collect();
        let expected: Vec<f32> = bytes.iter().map(|p| (f32::from(*p) / 255.0 - 0.5) / 0.25).collect();
        for pixels in [PixelFormat::F32Normalized, PixelFormat::F16Normalized] {
            let mut subscription = delivery.subscribe(0, Policy { pixels, ..Policy::default() });
            let file = Checkpoint::parse(subscription.next().await.unwrap().payload).unwrap();
            assert_eq!(file.metadata()["pixels"], pixels.name());
            let data = file.get("images").unwrap().data.to_vec();
            let found: Vec<f32> = match pixels {
                PixelFormat::F16Normalized => {
                    data.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
                }
                _ => data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            };
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 2e-3, "{found} {expected}");
            }
        }
    });
}

#[test]
fn readers_of_one_policy_share_their_bytes() {
    run(async {
        let delivery = delivery(&[4, 4]).await;
        let mut payloads = Vec::new();
        for policy in [Policy::default(), Policy { batch_size: Some(3), ..Policy::default() }] {
            for _ in 0..2 {
                let mut subscription = delivery.subscribe(0, policy.clone());
                payloads.push(subscription.next().await.unwrap().payload.as_ptr());
            }
        }
        assert_eq!(payloads[0], payloads[1]);
        assert_eq!(payloads[2], payloads[3]);
    });
}

#[test]
fn a_warm_start_does_not_wait_for_a_storage_that_does_not_answer() {
    run(async {
        let storage = crate::storage::Storage::open("memory:").unwrap();
        let log = open_in(&storage, Retention::default()).await;
        log.append(&Arc::new(batch(0, 8))).await.unwrap();
        let recalled = delivery_of(log).recall(20).await.unwrap();
        assert_eq!((recalled.labels.len(), recalled.images.len(), recalled.drawn_from), (20, 20 * 8, 8));

        // Nothing of it is in memory, and each read takes longer than a batch from noise.
        let slow = delivery_of(open_in(&storage.slowed(Duration::from_secs(10)), Retention::default()).await);
        let began = tokio::time::Instant::now();
        assert!(slow.recall(20).await.is_none());
        assert_eq!(began.elapsed().as_secs(), RECALL_PATIENCE.as_secs(), "one read, and no second one");
    });
}

#[test]
fn a_large_message_is_put_together_elsewhere_and_is_the_same() {
    run(async {
        let delivery = delivery(&[97; 60]).await;
        for share in [0.0, 0.5] {
            let replay = Replay { share, ..Replay::default() };
            let policy = Policy { batch_size: Some(5800), replay, ..Policy::default() };
            let message = delivery.subscribe(0, policy).next().await.unwrap();
            assert!(message.payload.len() > 256 << 10, "{}", message.payload.len());
            let fresh = message.fresh_count as usize;
            let spelled = spelled(&message);
            assert_eq!(spelled.len(), 5800);
            assert!(spelled.iter().take(fresh).copied().eq(0..fresh as u64));
            assert!(spelled.iter().all(|sequence| *sequence < 97 * 60));
        }
    });
}

#[test]
fn tables_follow_the_log_and_are_seldom_made_anew() {
    run(async {
        let retention = Retention { max_images: Some(200), ..Retention::default() };
        let delivery = delivery_of(filled(&[10; 20], retention).await);
        let log = delivery.log().clone();
        let table = delivery.table(Sampling::Uniform, None);
        assert!(Arc::ptr_eq(&table, &delivery.table(Sampling::Uniform, None)), "one for all who sample alike");
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let mut drawn = || {
            let candidates = (0..2000).filter_map(|_| table.draw(&mut random));
            candidates.map(|c| (c.entry.summary.first_sequence, c)).collect::<BTreeMap<_, _>>()
        };
        assert!(drawn().is_empty(), "it has not seen the log yet");
        table.follow(&log).await;
        let before = drawn();
        assert_eq!(before.keys().copied().collect::<Vec<_>>(), (0..20).map(|n| n * 10).collect::<Vec<_>>());

        // One comes and one goes: taken in, and nothing made anew. The one that is gone may be drawn, and is passed over.
        assert_eq!(log.append(&Arc::new(batch(200, 10))).await.unwrap(), 200);
        log.retain().await.unwrap();
        table.follow(&log).await;
        let after = drawn();
        assert!(Arc::ptr_eq(&before[&100], &after[&100]));
        assert!(after.contains_key(&200) && after.contains_key(&0) && !log.holds(0));
        let policy = Policy {
            replay: Replay { share: 1.0, ..Replay::default() },
            batch_size: Some(2000),
            ..Policy::default()
        };
        let message = delivery.subscribe(210, policy).next().await.unwrap();
        assert!(spelled(&message).iter().all(|sequence| (10..210).contains(sequence)));

        // Once more than an eighth is gone.
        for first in [210, 220] {
            assert_eq!(log.append(&Arc::new(batch(first, 10))).await.unwrap(), first);
            log.retain().await.unwrap();
        }
        table.follow(&log).await;
        assert_eq!(drawn().keys().copied().collect::<Vec<_>>(), (3..23).map(|n| n * 10).collect::<Vec<_>>());
        drop(table);
        delivery.table(Sampling::Recency, None);
        assert_eq!(delivery.tables.lock().unwrap().len(), 1, "nobody draws from the first one any more");
    });
}
