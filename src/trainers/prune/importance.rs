//! First-order Taylor importance of channels (Molchanov et al., CVPR 2019), and which of them go next.
//!
//! The importance of a gate g = 1 behind a batch norm is (dL/dg)², and dL/dg is the sum of y dL/dy over the batch norm's
//! output y = γ x̂ + β, that is γ dL/dγ + β dL/dβ: the gradients of the batch norm's own parameters hold it, and no gate is
//! needed. Where shortcuts tie channels together one gate is shared: its gradients are summed before they are squared, and
//! the square is divided by their number, as published.

use std::collections::{BTreeMap, BTreeSet};

use tch::{Device, Kind, Tensor};

use crate::model::channels::{Channel, Group, Place, batch_norms, groups, without};
use crate::model::spec::NetworkSpec;
use crate::model::trainable::TrainableNetwork;

/// What stays of the importance at each pruning step, as published.
const MOMENTUM: f64 = 0.9;
/// No place loses more than all but this part of the channels that it began with.
const SMALLEST_PART: f64 = 0.1;

/// Importance accumulated over mini-batches.
#[derive(Debug)]
pub struct Importance {
    groups: Vec<Group>,
    norms: Vec<(String, Place)>,
    /// Moving average over pruning steps, by group.
    average: Vec<f64>,
    /// Sum over the mini-batches since the last one.
    sums: Vec<f64>,
    batches: u32,
    /// Channels that each place must keep.
    least: BTreeMap<Place, usize>,
}

impl Importance {
    /// Of a network that lost nothing yet.
    pub fn new(spec: &NetworkSpec) -> Self {
        let mut this = Self {
            groups: groups(spec),
            norms: batch_norms(spec),
            average: Vec::new(),
            sums: Vec::new(),
            batches: 0,
            least: BTreeMap::new(),
        };
        this.average = vec![0.0; this.groups.len()];
        this.sums = vec![0.0; this.groups.len()];
        for (place, width) in widths(&this.groups) {
            this.least.insert(place, ((width as f64 * SMALLEST_PART) as usize).max(1));
        }
        this
    }

    /// Takes in a mini-batch: call after backward and before the gradients are cleared.
    pub fn accumulate(&mut self, network: &TrainableNetwork) {
        let _guard = tch::no_grad_guard();
        let mut gates: BTreeMap<Place, (Vec<f64>, f64)> = BTreeMap::new();
        for (prefix, place) in &self.norms {
            let part = |part: &str| network.parameter(&format!("{prefix}.{part}"));
            let (Some(weight), Some(bias)) = (part("weight"), part("bias")) else { continue };
            let (weight_gradient, bias_gradient) = (weight.grad(), bias.grad());
            if !weight_gradient.defined() || !bias_gradient.defined() {
                continue;
            }
            let gate: Tensor = weight * weight_gradient + bias * bias_gradient;
            let gate: Vec<f64> = Vec::try_from(gate.to_device(Device::Cpu).to_kind(Kind::Double)).unwrap_or_default();
            let (sums, count) = gates.entry(*place).or_insert_with(|| (vec![0.0; gate.len()], 0.0));
            sums.iter_mut().zip(gate).for_each(|(sum, value)| *sum += value);
            *count += 1.0;
        }
        let of = |lane: &[Channel]| {
            let parts = lane.iter().filter_map(|(place, channel)| {
                let (sums, count) = gates.get(place)?;
                Some((*sums.get(*channel)?, *count))
            });
            let (sum, count) = parts.fold((0.0, 0.0), |(sum, all), (value, count)| (sum + value, all + count));
            sum * sum / f64::max(count, 1.0)
        };
        for (sum, group) in self.sums.iter_mut().zip(&self.groups) {
            // A pair counts as one of its two.
            *sum += group.lanes.iter().map(|lane| of(lane)).sum::<f64>() / group.lanes.len().max(1) as f64;
        }
        self.batches += 1;
    }

    /// Closes a pruning step, and names what goes: the least important groups first, until `enough` says so of the network
    /// that would be left. With `latency` a group's score is its importance less that many times what it costs, both
    /// relative to their means; the cost of a channel is given by place.
    pub fn choose(
        &mut self,
        spec: &NetworkSpec,
        latency: Option<(f64, &BTreeMap<Place, f64>)>,
        enough: impl Fn(&NetworkSpec) -> bool,
    ) -> BTreeSet<Channel> {
        let batches = f64::from(self.batches.max(1));
        for (average, sum) in self.average.iter_mut().zip(&mut self.sums) {
            *average = MOMENTUM * *average + (1.0 - MOMENTUM) * *sum / batches;
            *sum = 0.0;
        }
        self.batches = 0;
        let scores = self.scores(latency);
        let mut order: Vec<usize> = (0..self.groups.len()).collect();
        order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        let mut left: BTreeMap<Place, usize> = widths(&self.groups);
        let mut removed = BTreeSet::new();
        for index in order {
            if enough(&without(spec, &removed).0) {
                break;
            }
            let lost = widths(std::slice::from_ref(&self.groups[index]));
            let may = lost.iter().all(|(place, lost)| {
                left.get(place).copied().unwrap_or(0) >= lost + self.least.get(place).copied().unwrap_or(1)
            });
            if may {
                for (place, lost) in lost {
                    left.entry(place).and_modify(|width| *width -= lost);
                }
                removed.extend(self.groups[index].channels());
            }
        }
        removed
    }

    fn scores(&self, latency: Option<(f64, &BTreeMap<Place, f64>)>) -> Vec<f64> {
        let Some((weight, costs)) = latency else { return self.average.clone() };
        let costs: Vec<f64> = self
            .groups
            .iter()
            .map(|group| group.channels().filter_map(|(place, _)| costs.get(&place)).sum())
            .collect();
        let mean = |values: &[f64]| (values.iter().sum::<f64>() / values.len().max(1) as f64).max(f64::MIN_POSITIVE);
        let (importance, cost) = (mean(&self.average), mean(&costs));
        self.average.iter().zip(&costs).map(|(i, c)| i / importance - weight * c / cost).collect()
    }

    /// Goes on with the network that is left after [`Self::choose`].
    pub fn shrink(&mut self, smaller: &NetworkSpec, removed: &BTreeSet<Channel>) {
        let stays = |group: &Group| group.channels().all(|channel| !removed.contains(&channel));
        // Channels of a place keep their order, so groups of the smaller network are found by their renumbered channels.
        let renumbered = |(place, channel): Channel| {
            let before = removed.range((place, 0)..(place, channel)).count();
            (place, channel - before)
        };
        let mut known: BTreeMap<Vec<Channel>, f64> = BTreeMap::new();
        for (group, average) in self.groups.iter().zip(&self.average).filter(|(group, _)| stays(group)) {
            for lane in &group.lanes {
                known.insert(lane.iter().copied().map(renumbered).collect(), *average);
            }
        }
        self.groups = groups(smaller);
        let of = |group: &Group| {
            let lanes = group.lanes.iter().filter_map(|lane| known.get(lane));
            lanes.sum::<f64>() / group.lanes.len().max(1) as f64
        };
        self.average = self.groups.iter().map(of).collect();
        self.sums = vec![0.0; self.groups.len()];
    }
}

/// The channels of each place.
fn widths(groups: &[Group]) -> BTreeMap<Place, usize> {
    let mut widths = BTreeMap::new();
    for (place, _) in groups.iter().flat_map(Group::channels) {
        *widths.entry(place).or_insert(0) += 1;
    }
    widths
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// dL/dg of a gate behind the batch norm is what the loss does when its scale and shift grow together.
    #[test]
    fn importance_is_the_squared_gradient_of_a_gate() {
        let _alone = crate::testing::drawing_alone();
        tch::manual_seed(2);
        let spec = NetworkSpec::fresh("resnet8", 1, 3).unwrap();
        let network = TrainableNetwork::fresh(&spec, Device::Cpu);
        let x = Tensor::randn([8, 1, 8, 8], (Kind::Float, Device::Cpu));
        let loss = || network.forward(&x).square().sum(Kind::Double);
        loss().backward();
        let mut importance = Importance::new(&spec);
        importance.accumulate(&network);
        // The largest of its place: f32 cannot resolve the slope of the smallest.
        let inner =
            |group: &Group| group.channels().find(|(place, _)| *place == Place::Inner(1)).map(|(_, channel)| channel);
        let of_place =
            importance.groups.iter().zip(&importance.sums).filter_map(|(group, sum)| Some((inner(group)?, *sum)));
        let (channel, importance) = of_place.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
        let gate = |factor: f64| {
            for part in ["weight", "bias"] {
                let name = format!("{}.bn1.{part}", spec.blocks[1].prefix);
                tch::no_grad(|| _ = network.parameter(&name).unwrap().get(channel as i64).g_mul_scalar_(factor));
            }
            let value = loss().double_value(&[]);
            for part in ["weight", "bias"] {
                let name = format!("{}.bn1.{part}", spec.blocks[1].prefix);
                tch::no_grad(|| {
                    _ = network.parameter(&name).unwrap().get(channel as i64).g_mul_scalar_(1.0 / factor)
                });
            }
            value
        };
        let step = 0.02;
        let slope = ((gate(1.0 + step) - gate(1.0 - step)) / (2.0 * step)).abs();
        assert!((importance.sqrt() - slope).abs() < 0.05 * slope, "{} is not {slope}", importance.sqrt());
    }

    #[test]
    fn the_least_important_go_first_and_no_place_is_emptied() {
        let spec = NetworkSpec::fresh("resnet8", 1, 3).unwrap();
        let mut importance = Importance::new(&spec);
        importance.sums = (0..importance.groups.len()).map(|index| index as f64).collect();
        let first = importance.groups[0].clone();
        let few = importance.choose(&spec, None, |left| left.num_parameters() < spec.num_parameters());
        assert_eq!(few, first.channels().collect());
        let all = importance.choose(&spec, None, |_| false);
        let (smaller, _) = without(&spec, &all);
        assert!(smaller.stem_width >= 1 && smaller.blocks.iter().all(|block| block.mid_width >= 1));
        assert_eq!(smaller.blocks[0].mid_width, 1);

        importance.shrink(&smaller, &all);
        assert_eq!(importance.average.len(), groups(&smaller).len());
        assert!(importance.average.iter().any(|average| *average > 0.0));
    }
}
