//! Which channels of a network can be removed, what hangs together when one is, and a network without them.
//!
//! Two kinds of places hold channels: the inside of a block (between its two convolutions), where each channel is on its
//! own, and the stream that shortcuts tie together, where a channel is the same one in every block of a stage. Under option A
//! (zero-padded shortcuts) it goes on into the next stages, and new channels come in front of it and behind it in equal
//! numbers: these go in pairs, so that what is left is still in the middle. Host only: no tensor on a device.

use std::collections::BTreeSet;

use super::spec::{NetworkSpec, Shortcut};

/// Where channels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// The stream of a stage; 0 begins with the stem, and each block with a shortcut other than the identity begins the next.
    Stream(usize),
    /// Between the two convolutions of a block.
    Inner(usize),
}

/// One channel.
pub type Channel = (Place, usize);

/// Channels that can only be removed together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// One or two lanes; each lane is one channel wherever it goes.
    pub lanes: Vec<Vec<Channel>>,
}

impl Group {
    /// Every channel of it.
    pub fn channels(&self) -> impl Iterator<Item = Channel> {
        self.lanes.iter().flatten().copied()
    }
}

/// The stage of each block's output.
pub fn stages(spec: &NetworkSpec) -> Vec<usize> {
    let mut stage = 0;
    let next = |block: &super::spec::BlockSpec| {
        stage += usize::from(block.shortcut != Shortcut::Identity);
        stage
    };
    spec.blocks.iter().map(next).collect()
}

/// The place of the channels that each batch norm works on, in the order in which PyTorch registers them, with the
/// prefix of its tensors.
pub fn batch_norms(spec: &NetworkSpec) -> Vec<(String, Place)> {
    let mut norms = vec![("bn1".to_owned(), Place::Stream(0))];
    for (index, (block, stage)) in spec.blocks.iter().zip(stages(spec)).enumerate() {
        let p = &block.prefix;
        norms.push((format!("{p}.bn1"), Place::Inner(index)));
        norms.push((format!("{p}.bn2"), Place::Stream(stage)));
        if block.shortcut == Shortcut::Projection {
            norms.push((format!("{p}.{}.1", spec.naming.shortcut), Place::Stream(stage)));
        }
    }
    norms
}

/// Everything that can be removed on its own.
pub fn groups(spec: &NetworkSpec) -> Vec<Group> {
    let inner = spec.blocks.iter().enumerate().flat_map(|(index, block)| {
        (0..block.mid_width).map(move |channel| Group { lanes: vec![vec![(Place::Inner(index), channel)]] })
    });
    let mut groups: Vec<Group> = inner.collect();
    // The lanes that run through the present stage, by channel: indices into `lanes`.
    let mut lanes: Vec<Vec<Channel>> = (0..spec.stem_width).map(|c| vec![(Place::Stream(0), c)]).collect();
    let mut together: Vec<Vec<usize>> = (0..spec.stem_width).map(|lane| vec![lane]).collect();
    let mut present: Vec<usize> = (0..spec.stem_width).collect();
    for (block, stage) in spec.blocks.iter().zip(stages(spec)) {
        let mut begin = |channel: usize| {
            lanes.push(vec![(Place::Stream(stage), channel)]);
            lanes.len() - 1
        };
        match block.shortcut {
            Shortcut::Identity => continue,
            Shortcut::Projection => {
                present = (0..block.out_width).map(&mut begin).collect();
                together.extend(present.iter().map(|lane| vec![*lane]));
            }
            Shortcut::Pad => {
                let new = block.out_width.saturating_sub(block.in_width);
                let before: Vec<usize> = (0..new / 2).map(&mut begin).collect();
                let after: Vec<usize> = (new / 2 + block.in_width..block.out_width).map(&mut begin).collect();
                for (channel, lane) in (new / 2..).zip(&present) {
                    lanes[*lane].push((Place::Stream(stage), channel));
                }
                let pairs =
                    (0..after.len()).map(|at| before.get(at).into_iter().chain(after.get(at)).copied().collect());
                together.extend(pairs);
                present = before.into_iter().chain(present).chain(after).collect();
            }
        }
    }
    groups.extend(
        together.into_iter().map(|together| Group {
            lanes: together.into_iter().filter_map(|lane| lanes.get(lane).cloned()).collect(),
        }),
    );
    groups
}

/// The network without these channels, which are whole groups; and, for each tensor by name, which rows (outputs) and
/// columns (inputs) stay; None = all.
pub fn without(spec: &NetworkSpec, removed: &BTreeSet<Channel>) -> (NetworkSpec, Vec<(String, Kept)>) {
    let stay = |place: Place, width: usize| -> Vec<i64> {
        (0..width).filter(|channel| !removed.contains(&(place, *channel))).map(|channel| channel as i64).collect()
    };
    let mut smaller = spec.clone();
    let mut kept = Vec::new();
    let mut unit = |conv: String, bn: String, rows: &[i64], columns: Option<&[i64]>| {
        kept.push((
            format!("{conv}.weight"),
            Kept { rows: Some(rows.to_vec()), columns: columns.map(<[i64]>::to_vec) },
        ));
        for part in ["weight", "bias", "running_mean", "running_var"] {
            kept.push((format!("{bn}.{part}"), Kept { rows: Some(rows.to_vec()), columns: None }));
        }
    };
    let mut stream = stay(Place::Stream(0), spec.stem_width);
    unit("conv1".into(), "bn1".into(), &stream, None);
    smaller.stem_width = stream.len();
    for (index, (block, stage)) in spec.blocks.iter().zip(stages(spec)).enumerate() {
        let p = &block.prefix;
        let inner = stay(Place::Inner(index), block.mid_width);
        let out = stay(Place::Stream(stage), block.out_width);
        unit(format!("{p}.conv1"), format!("{p}.bn1"), &inner, Some(&stream));
        unit(format!("{p}.conv2"), format!("{p}.bn2"), &out, Some(&inner));
        if block.shortcut == Shortcut::Projection {
            let s = format!("{p}.{}", spec.naming.shortcut);
            unit(format!("{s}.0"), format!("{s}.1"), &out, Some(&stream));
        }
        if let Some(smaller) = smaller.blocks.get_mut(index) {
            (smaller.in_width, smaller.mid_width, smaller.out_width) = (stream.len(), inner.len(), out.len());
        }
        stream = out;
    }
    kept.push((format!("{}.weight", spec.naming.head), Kept { rows: None, columns: Some(stream) }));
    (smaller, kept)
}

/// The parts of a tensor that stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Along the first dimension.
    pub rows: Option<Vec<i64>>,
    /// Along the second.
    pub columns: Option<Vec<i64>>,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn remove(spec: &NetworkSpec, groups: &[Group]) -> NetworkSpec {
        without(spec, &groups.iter().flat_map(Group::channels).collect()).0
    }

    #[test]
    fn every_channel_is_in_exactly_one_unit() {
        for arch in ["resnet20", "resnet20-projection", "resnet18"] {
            let spec = NetworkSpec::fresh(arch, 3, 10).unwrap();
            let mut seen: Vec<Channel> = groups(&spec).iter().flat_map(Group::channels).collect();
            let all = seen.len();
            seen.sort_unstable();
            seen.dedup();
            let inner: usize = spec.blocks.iter().map(|block| block.mid_width).sum();
            let stages = stages(&spec);
            let first = |stage: usize| stages.iter().position(|s| *s == stage).unwrap();
            let streams: usize = (1..=*stages.last().unwrap()).map(|stage| spec.blocks[first(stage)].out_width).sum();
            assert_eq!((all, seen.len()), (inner + streams + spec.stem_width, all), "{arch}");
        }
    }

    #[test]
    fn padded_channels_stay_in_the_middle() {
        let spec = NetworkSpec::fresh("resnet20", 3, 10).unwrap();
        let all = groups(&spec);
        // Any groups, in any number: what a later stage adds is split in halves, the larger one behind.
        for skip in [2, 3, 5] {
            let removed: Vec<Group> = all.iter().step_by(skip).cloned().collect();
            let channels: BTreeSet<Channel> = removed.iter().flat_map(Group::channels).collect();
            let smaller = remove(&spec, &removed);
            for (index, block) in spec.blocks.iter().enumerate().filter(|(_, block)| block.shortcut == Shortcut::Pad)
            {
                let stage = stages(&spec)[index];
                let stays = |range: std::ops::Range<usize>| {
                    range.filter(|channel| !channels.contains(&(Place::Stream(stage), *channel))).count()
                };
                let new = block.out_width - block.in_width;
                let before = stays(0..new / 2);
                let behind = stays(new / 2 + block.in_width..block.out_width);
                let block = &smaller.blocks[index];
                assert_eq!(block.out_width - block.in_width, before + behind);
                assert_eq!(before, (before + behind) / 2);
            }
        }
    }

    #[test]
    fn a_smaller_network_is_told_from_its_tensors() {
        let spec = NetworkSpec::fresh("resnet20", 3, 10).unwrap();
        let smaller = remove(&spec, &groups(&spec)[..5]);
        assert_eq!(smaller.blocks[0].mid_width, 11);
        assert!(smaller.multiply_adds(32, 32) < spec.multiply_adds(32, 32));
    }
}
