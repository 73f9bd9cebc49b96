//! One subscriber: which images come next, and in which message.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tokio::sync::watch;

use super::assemble::{Assembly, Layout};
use super::policy::Policy;
use super::sampling::{ROWS_PER_DRAW, Table, draw_rows};
use super::{Delivery, NoRoom, Ticket};
use crate::log::{CacheUse, Chunk, Entry, Located, ReadError};
use crate::storage::blocking;

/// A storage that does not answer is asked again for so long before the stream ends.
const READ_PATIENCE: Duration = Duration::from_secs(20);
/// The first pause between two attempts; each is twice as long as the one before.
const READ_PAUSE: Duration = Duration::from_millis(100);
/// Draws that may find nothing, for each one that is wanted: chunks whose images are all too stale.
const VAIN_DRAWS: usize = 20;

/// Messages above this many bytes are put together away from the runtime's threads; below, that would cost more.
const INLINE_BYTES: usize = 256 << 10;
/// Chunks that such a message holds at one time while it is put together.
const CHUNKS_AT_ONCE: usize = 16;

/// One message for the subscriber.
#[derive(Clone, Debug)]
pub struct Message {
    /// The safetensors file.
    pub payload: Bytes,
    /// The sequence from which a new subscription goes on after this message.
    pub position: u64,
    /// The sequence of the first image in it.
    pub first_sequence: u64,
    /// Images in it.
    pub count: u32,
    /// How many of them are fresh; those come first.
    pub fresh_count: u32,
    /// When its oldest image was finished.
    pub oldest: SystemTime,
    /// The share of the images sent so far, this message included, that were replayed.
    pub replay_ratio: f64,
    /// Images so far that were passed over because they were staler than the bound.
    pub stale_images: u64,
}

/// Why a subscription ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The next image was evicted.
    Overtaken {
        /// The image.
        position: u64,
        /// The first sequence that is still there.
        first_sequence: u64,
    },
    /// The next image is lost to damage.
    Lost {
        /// The image.
        position: u64,
        /// The next sequence that is there.
        next_sequence: u64,
    },
    /// The position lies beyond the next image to be made.
    Ahead {
        /// The position.
        position: u64,
        /// The next image to be made.
        next_sequence: u64,
    },
    /// The storage does not answer.
    Storage(String),
    /// Messages of other readers, which are slow, left no room for the next one.
    NoRoom(NoRoom),
}

impl From<NoRoom> for End {
    fn from(problem: NoRoom) -> Self {
        Self::NoRoom(problem)
    }
}

/// One image on its way into a message.
#[derive(Clone, Copy, Debug)]
struct Pick {
    chunk: u64,
    row: u32,
    student_version: i64,
    created_at: SystemTime,
}

impl Pick {
    fn sequence(&self) -> u64 {
        self.chunk + u64::from(self.row)
    }
}

/// The chunks that images were just drawn from, by first sequence: most are still in memory when their images are copied a
/// moment later. Nothing is held by it.
type Seen = HashMap<u64, Weak<Chunk>>;

/// A subscriber's state.
#[derive(Debug)]
pub struct Subscription {
    delivery: Arc<Delivery>,
    policy: Policy,
    form: Arc<str>,
    news: watch::Receiver<u64>,
    ticket: Ticket,
    /// The next image to look at.
    position: u64,
    /// The position after the last message.
    sent_to: u64,
    /// Fresh images for the next message, found so far.
    picked: Vec<Pick>,
    /// Fresh images that are due although the share of replayed ones left no whole one.
    credit: f64,
    sent: u64,
    replayed: u64,
    stale: u64,
    /// What is replayed is drawn from it; from the first draw on.
    table: Option<Arc<Table>>,
    /// Of the last message.
    layout: Option<Arc<Layout>>,
    random: ChaCha8Rng,
}

impl Subscription {
    pub(super) fn new(delivery: Arc<Delivery>, position: u64, policy: Policy) -> Self {
        Self {
            news: delivery.log.watch(),
            ticket: delivery.audience.join(position, policy.replay.share < 1.0),
            form: policy.form(),
            delivery,
            policy,
            position,
            sent_to: position,
            picked: Vec::new(),
            credit: 0.0,
            sent: 0,
            replayed: 0,
            stale: 0,
            table: None,
            layout: None,
            random: ChaCha8Rng::seed_from_u64(rand::random()),
        }
    }

    /// The position from which a new subscription would go on.
    pub fn resume_from(&self) -> u64 {
        self.sent_to
    }

    /// The next message, waiting for fresh images where the policy has nothing else to send. May be dropped at any time:
    /// what it had found so far is kept.
    pub async fn next(&mut self) -> Result<Message, End> {
        loop {
            // Seen before the read: what is appended after it wakes the wait below.
            self.news.borrow_and_update();
            if let Some(message) = self.try_next().await? {
                self.ticket.move_to(self.sent_to);
                let replayed = message.count.saturating_sub(message.fresh_count);
                self.delivery.sent.fetch_add(u64::from(message.count), Ordering::Relaxed);
                self.delivery.replayed.fetch_add(u64::from(replayed), Ordering::Relaxed);
                return Ok(message);
            }
            // It has seen everything and wants more, also where a message is half full.
            self.ticket.move_to(self.position);
            // The bound is only a safety net: a missed wake-up would cost a minute, not the stream.
            let _ = tokio::time::timeout(Duration::from_secs(60), self.news.changed()).await;
        }
    }

    async fn try_next(&mut self) -> Result<Option<Message>, End> {
        if self.policy.is_plain() {
            return self.whole_chunk().await;
        }
        loop {
            let batch_size = self.policy.batch_size;
            let fresh_wanted = match batch_size {
                Some(size) => self.fresh_due(size),
                None => 1,
            };
            // Where the log breaks off, what was found before goes out first, in a message that may be short: whoever goes
            // on behind the break never comes back for it. The next call meets the break again.
            let broken = match self.find_fresh(fresh_wanted).await {
                Err(end) if self.picked.is_empty() => return Err(end),
                found => found.is_err(),
            };
            if self.drop_stale() {
                continue;
            }
            let share = self.policy.replay.share;
            let mut seen = Seen::new();
            let replayed = match batch_size {
                Some(size) if share > 0.0 => {
                    let most = fresh_wanted.min(self.picked.len());
                    self.draw_replayed(size - most, &mut seen).await?
                }
                // Without replay a message waits until it is full.
                Some(size) if self.picked.len() < size && !broken => return Ok(None),
                _ => Vec::new(),
            };
            let fresh = if batch_size.is_some() { fresh_wanted.min(self.picked.len()) } else { self.picked.len() };
            if fresh + replayed.len() == 0 {
                return Ok(None);
            }
            if let Some(message) = self.assemble(fresh, replayed, &seen).await? {
                return Ok(Some(message));
            }
            // Something in it was evicted or went stale while it was put together: look again.
        }
    }

    /// A chunk as it was made, or the rest of the one that the position lies in.
    async fn whole_chunk(&mut self) -> Result<Option<Message>, End> {
        let Some(entry) = self.locate()? else { return Ok(None) };
        let room = self.delivery.flight.room(entry.bytes).await?;
        let Some(mut chunk) = self.load(entry.summary.first_sequence).await? else {
            drop(room);
            return Box::pin(self.whole_chunk()).await;
        };
        let position = self.position;
        if chunk.first_sequence() < position {
            // Only the first message can begin inside a chunk, whose rest is then encoded anew.
            let rest = blocking(move || chunk.tail_from(position)).await;
            let rest = rest.and_then(|rest| rest.map_err(|e| e.to_string())).map_err(End::Storage)?;
            chunk = Arc::new(rest);
        }
        let count = chunk.count();
        self.position = chunk.end();
        self.sent_to = self.position;
        self.sent += u64::from(count);
        Ok(Some(Message {
            payload: room.hold(chunk.payload().clone()),
            position: self.position,
            first_sequence: chunk.first_sequence(),
            count,
            fresh_count: count,
            oldest: chunk.summary.created_at,
            replay_ratio: 0.0,
            stale_images: 0,
        }))
    }

    /// The fresh images that the next message should have: its part of the batch, and what earlier parts left over.
    fn fresh_due(&self, size: usize) -> usize {
        let due = (1.0 - self.policy.replay.share) * size as f64 + self.credit;
        // Rounding errors must not withhold an image for ever.
        ((due + 1e-9) as usize).min(size)
    }

    fn locate(&self) -> Result<Option<Arc<Entry>>, End> {
        let position = self.position;
        match self.delivery.log.locate(position) {
            Located::Chunk(entry) => Ok(Some(entry)),
            Located::Wait => Ok(None),
            Located::Overtaken { first_sequence } => Err(End::Overtaken { position, first_sequence }),
            Located::Lost { next_sequence } => Err(End::Lost { position, next_sequence }),
            Located::Ahead { next_sequence } => Err(End::Ahead { position, next_sequence }),
        }
    }

    /// The chunk; None where it is gone since it was located, so that locating it again tells why.
    async fn load(&self, first_sequence: u64) -> Result<Option<Arc<Chunk>>, End> {
        let began = tokio::time::Instant::now();
        let mut pause = READ_PAUSE;
        loop {
            match self.delivery.log.load(first_sequence).await {
                Ok(chunk) => return Ok(Some(chunk)),
                Err(ReadError::Gone | ReadError::Damaged) => return Ok(None),
                Err(ReadError::Storage(problem)) if began.elapsed() + pause > READ_PATIENCE => {
                    return Err(End::Storage(problem));
                }
                Err(ReadError::Storage(_)) => {
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
            }
        }
    }

    /// Moves on through the log until it has `wanted` images or the log ends. Without a batch size: until a chunk has
    /// any, and then all of that chunk.
    async fn find_fresh(&mut self, wanted: usize) -> Result<(), End> {
        while self.picked.len() < wanted {
            let Some(entry) = self.locate()? else { return Ok(()) };
            let first = entry.summary.first_sequence;
            let Some(chunk) = self.load(first).await? else { continue };
            let most = self.policy.batch_size.map_or(usize::MAX, |_| wanted - self.picked.len());
            let (now, current) = (SystemTime::now(), self.delivery.current_version());
            let mut taken = 0;
            let mut next = chunk.end();
            let rows = (0u32..).zip(chunk.labels()).zip(chunk.student_versions());
            for ((row, label), version) in rows.skip((self.position - first) as usize) {
                let sequence = first + u64::from(row);
                if taken == most {
                    next = sequence;
                    break;
                }
                if !self.policy.shard.has(sequence) || !self.policy.wants(i64::from_le_bytes(*label)) {
                    continue;
                }
                let student_version = i64::from_le_bytes(*version);
                let created_at = chunk.summary.created_at;
                if self.policy.staleness.exceeded(student_version, created_at, current, now) {
                    self.stale += 1;
                    continue;
                }
                self.picked.push(Pick { chunk: first, row, student_version, created_at });
                taken += 1;
            }
            self.position = next;
        }
        Ok(())
    }

    fn is_stale(&self, pick: &Pick) -> bool {
        if !self.policy.staleness.is_bounded() {
            return false;
        }
        let (now, current) = (SystemTime::now(), self.delivery.current_version());
        self.policy.staleness.exceeded(pick.student_version, pick.created_at, current, now)
    }

    /// Lets go of images that went stale while they waited for their message; whether there were any.
    fn drop_stale(&mut self) -> bool {
        if !self.policy.staleness.is_bounded() {
            return false;
        }
        let before = self.picked.len();
        let picked = std::mem::take(&mut self.picked);
        self.picked = picked.into_iter().filter(|pick| !self.is_stale(pick)).collect();
        let dropped = before - self.picked.len();
        self.stale += dropped as u64;
        dropped > 0
    }

    /// Images of the log to send again; fewer than asked for only where the log has none that may be sent.
    async fn draw_replayed(&mut self, wanted: usize, seen: &mut Seen) -> Result<Vec<Pick>, End> {
        let mut drawn = Vec::with_capacity(wanted);
        let sampling = self.policy.replay.sampling;
        let mut vain = 0;
        let delivery = &self.delivery;
        let table = self.table.get_or_insert_with(|| delivery.table(sampling, self.policy.classes.as_ref())).clone();
        table.follow(&self.delivery.log).await;
        while drawn.len() < wanted && vain < VAIN_DRAWS * wanted.div_ceil(ROWS_PER_DRAW) {
            let Some(candidate) = table.draw(&mut self.random) else { break };
            let first_sequence = candidate.entry.summary.first_sequence;
            // What was evicted is not sent again, although somebody may still hold it.
            let chunk = match (self.delivery.log.holds(first_sequence), candidate.chunk()) {
                (false, _) => None,
                (true, Some(chunk)) => Some(chunk),
                (true, None) => self.load(first_sequence).await?,
            };
            let Some(chunk) = chunk else {
                // It was evicted or lost.
                table.follow(&self.delivery.log).await;
                vain += 1;
                continue;
            };
            // Always whole draws, cut at the end: a last draw of fewer rows would favour nobody, but need not be special.
            let classes = self.policy.classes.as_deref();
            let rows = draw_rows(&chunk, sampling, ROWS_PER_DRAW, classes, &mut self.random);
            let (before, versions) = (drawn.len(), chunk.student_versions());
            candidate.remember(&chunk);
            seen.insert(chunk.first_sequence(), Arc::downgrade(&chunk));
            for row in rows {
                let version = versions.get(row as usize).copied().unwrap_or_default();
                let pick = Pick {
                    chunk: chunk.first_sequence(),
                    row,
                    student_version: i64::from_le_bytes(version),
                    created_at: chunk.summary.created_at,
                };
                if !self.is_stale(&pick) {
                    drawn.push(pick);
                }
            }
            if drawn.len() == before {
                vain += 1;
            }
        }
        drawn.truncate(wanted);
        Ok(drawn)
    }

    /// Puts a message together out of the first `fresh` picked images and the replayed ones. None where it cannot be sent
    /// any more.
    async fn assemble(&mut self, fresh: usize, replayed: Vec<Pick>, seen: &Seen) -> Result<Option<Message>, End> {
        let mut picks = replayed;
        picks.splice(0..0, self.picked.iter().take(fresh).copied());
        let (Some(first), Some(last)) = (picks.first().copied(), picks.last().copied()) else { return Ok(None) };
        let layout = match &self.layout {
            Some(layout) if layout.fits(picks.len(), fresh) => layout.clone(),
            _ => Arc::new(Layout::new(self.delivery.log.identity(), self.policy.pixels, picks.len(), fresh)),
        };
        self.layout = Some(layout.clone());
        // Before there is anything to hold.
        let room = self.delivery.flight.room(layout.bytes() as u64).await?;
        let payload = if self.policy.is_deterministic() {
            let (first_sequence, end) = (first.sequence(), last.sequence() + 1);
            let key = CacheUse { first_sequence, end, form: self.form.clone() };
            self.delivery.log.shared(key, || self.payload(&picks, &layout, seen)).await
        } else {
            self.payload(&picks, &layout, seen).await
        };
        match payload {
            Ok(payload) => {
                // Chosen in time; sent in time?
                if self.policy.staleness.is_bounded() && picks.iter().any(|pick| self.is_stale(pick)) {
                    self.drop_stale();
                    return Ok(None);
                }
                Ok(Some(self.sent(room.hold(payload), &picks, fresh)))
            }
            Err(ReadError::Gone | ReadError::Damaged) => {
                self.look_again()?;
                Ok(None)
            }
            Err(ReadError::Storage(problem)) => Err(End::Storage(problem)),
        }
    }

    async fn payload(&self, picks: &[Pick], layout: &Arc<Layout>, seen: &Seen) -> Result<Bytes, ReadError> {
        let log = &self.delivery.log;
        // A large message would hold up a thread of the runtime, and with it every stream that waits there.
        let inline = layout.bytes() <= INLINE_BYTES;
        let most = if inline { 1 } else { CHUNKS_AT_ONCE };
        let mut assembly = Assembly::new(log.identity(), self.delivery.pixels.clone(), layout.clone());
        let mut pieces = Vec::with_capacity(most);
        // A few chunks at a time, however many a message is drawn from, and what lies together in one piece.
        let mut runs = picks.chunk_by(|one, next| one.chunk == next.chunk && one.row + 1 == next.row).peekable();
        while let Some(run) = runs.next() {
            let Some(first) = run.first() else { continue };
            let chunk = match seen.get(&first.chunk).and_then(Weak::upgrade) {
                Some(chunk) => chunk,
                None => log.load(first.chunk).await?,
            };
            let start = first.row as usize;
            pieces.push((chunk, start..start + run.len()));
            if pieces.len() == most || runs.peek().is_none() {
                let pieces = std::mem::replace(&mut pieces, Vec::with_capacity(most));
                let extend = move || extended(assembly, &pieces);
                let extended = if inline { extend() } else { blocking(extend).await.map_err(ReadError::Storage)? };
                assembly = extended.ok_or(ReadError::Gone)?;
            }
        }
        assembly.finish().ok_or(ReadError::Gone)
    }

    /// A chunk with picked images is not there any more: that ends the subscription where they are fresh, and says why.
    fn look_again(&mut self) -> Result<(), End> {
        for pick in &self.picked {
            let position = pick.sequence();
            match self.delivery.log.locate(position) {
                Located::Overtaken { first_sequence } => return Err(End::Overtaken { position, first_sequence }),
                Located::Lost { next_sequence } => return Err(End::Lost { position, next_sequence }),
                _ => {}
            }
        }
        Ok(())
    }

    fn sent(&mut self, payload: Bytes, picks: &[Pick], fresh: usize) -> Message {
        if let Some(size) = self.policy.batch_size {
            // What a scarce message leaves over is not saved up: the share of replayed images holds for every message.
            let due = (1.0 - self.policy.replay.share) * size as f64 + self.credit;
            self.credit = (due - fresh as f64).clamp(0.0, 1.0);
        }
        self.picked.drain(..fresh.min(self.picked.len()));
        // Images already found for the next message come again after a resume.
        self.sent_to = self.picked.first().map_or(self.position, Pick::sequence);
        self.sent += picks.len() as u64;
        self.replayed += picks.len().saturating_sub(fresh) as u64;
        Message {
            payload,
            position: self.sent_to,
            first_sequence: picks.first().map_or(0, Pick::sequence),
            count: u32::try_from(picks.len()).unwrap_or(u32::MAX),
            fresh_count: u32::try_from(fresh).unwrap_or(u32::MAX),
            oldest: picks.iter().map(|pick| pick.created_at).min().unwrap_or(SystemTime::UNIX_EPOCH),
            replay_ratio: self.replayed as f64 / (self.sent as f64).max(1.0),
            stale_images: self.stale,
        }
    }
}

/// The assembly with these rows of chunks appended; None where there are no such rows.
fn extended(mut assembly: Assembly, pieces: &[(Arc<Chunk>, Range<usize>)]) -> Option<Assembly> {
    pieces.iter().all(|(chunk, rows)| assembly.extend(chunk, rows.clone())).then_some(assembly)
}
