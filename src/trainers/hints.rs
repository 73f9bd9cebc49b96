//! Feature maps of the teacher that a student learns beside the logits ("hints", Romero et al. 2015, FitNets). They say
//! much more of each image than its logits, so far fewer images and steps are needed.
//!
//! The two networks are cut into segments that end at the same resolution: block by block where their stages have as many
//! blocks, otherwise stage by stage. Then there are two ways to learn:
//! - [`Hints::apart`]: each segment gets the *teacher's* map before it and learns the teacher's map after it (blockwise
//!   distillation, Wang et al. 2018; Li et al. 2020, DNA and Few Sample Knowledge Distillation). No segment waits for those
//!   before it to be right, so a random student becomes useful within a hundred steps. Needs equal widths where segments
//!   meet.
//! - [`Hints::together`]: the student's own maps at the ends of the segments, as the whole network makes them. Where the
//!   widths differ, attention maps (Zagoruyko and Komodakis 2017, eq. 2) take the maps' place: where a map is active, not in
//!   which channels.

use std::ops::Range;

use tch::{Kind, Reduction, Tensor};

use crate::model::network::Recorded;
use crate::model::spec::NetworkSpec;
use crate::model::trainable::{TrainableNetwork, pool};

/// Keeps a distance finite where a map is dark.
const SMALLEST: f64 = 1e-6;

/// Which blocks of a student stand for which of a teacher.
#[derive(Debug)]
pub struct Hints {
    segments: Vec<Segment>,
    /// The width before the first segment is the same.
    same_stem: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct Segment {
    student: Range<usize>,
    teacher: Range<usize>,
    /// The widths at the end are the same.
    same_width: bool,
}

/// Why a teacher's maps say nothing to a student.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoHints {
    /// Their maps have other resolutions.
    #[error(
        "the student {student} has other stages than the teacher {teacher}, so their feature maps differ in resolution; \
         leave --hint-weight and --blockwise out, or train a student of as many stages"
    )]
    Stages {
        /// The student's architecture.
        student: String,
        /// The teacher's.
        teacher: String,
    },
    /// The student's blocks cannot take the teacher's maps.
    #[error(
        "the student {student} has other widths than the teacher {teacher} where its stages begin or end, so its blocks \
         cannot take the teacher's feature maps; leave --blockwise out, --hint-weight works with any widths"
    )]
    Widths {
        /// The student's architecture.
        student: String,
        /// The teacher's.
        teacher: String,
    },
}

impl Hints {
    /// Cuts two networks into segments.
    pub fn between(student: &NetworkSpec, teacher: &NetworkSpec) -> Result<Self, NoHints> {
        let (ours, theirs) = (stages(student), stages(teacher));
        let strides = |spec: &NetworkSpec, stages: &[Range<usize>]| -> Vec<usize> {
            stages.iter().map(|stage| spec.blocks[stage.clone()].iter().map(|block| block.stride).product()).collect()
        };
        if strides(student, &ours) != strides(teacher, &theirs) {
            return Err(NoHints::Stages { student: student.arch().to_owned(), teacher: teacher.arch().to_owned() });
        }
        let mut segments = Vec::new();
        for (ours, theirs) in ours.into_iter().zip(theirs) {
            let mut cut = |ours: Range<usize>, theirs: Range<usize>| {
                let width = |spec: &NetworkSpec, segment: &Range<usize>| spec.blocks[segment.end - 1].out_width;
                let same_width = width(student, &ours) == width(teacher, &theirs);
                segments.push(Segment { student: ours, teacher: theirs, same_width });
            };
            if ours.len() == theirs.len() {
                ours.zip(theirs).for_each(|(ours, theirs)| cut(ours..ours + 1, theirs..theirs + 1));
            } else {
                cut(ours, theirs);
            }
        }
        Ok(Self { segments, same_stem: student.stem_width == teacher.stem_width })
    }

    /// Whether [`Self::apart`] is possible: equal widths wherever segments meet.
    pub fn check_apart(&self, student: &NetworkSpec, teacher: &NetworkSpec) -> Result<(), NoHints> {
        if self.same_stem && self.segments.iter().all(|segment| segment.same_width) {
            return Ok(());
        }
        Err(NoHints::Widths { student: student.arch().to_owned(), teacher: teacher.arch().to_owned() })
    }

    /// The mean distance of a student's maps, one a block, from those of the teacher on the same images. A scalar with a
    /// gradient; 0 where they agree, 1 where the student's are dark.
    pub fn together(&self, student: &[Tensor], teacher: &Recorded) -> Tensor {
        let teacher: Vec<&Tensor> = teacher.block_outputs().collect();
        let distances = self.segments.iter().map(|segment| {
            let (ours, theirs) = (&student[segment.student.end - 1], teacher[segment.teacher.end - 1]);
            if segment.same_width {
                relative_error(ours, theirs)
            } else {
                (attention(ours) - attention(theirs)).square().sum(Kind::Float) / ours.size()[0] as f64
            }
        });
        Tensor::stack(&distances.collect::<Vec<_>>(), 0).mean(Kind::Float)
    }

    /// The distances of the stem, of every segment and of the head from the teacher's on normalized images `[N, C, H, W]`,
    /// each on what the teacher gives it, added up. A scalar with a gradient; 0 where the networks agree.
    pub fn apart(&self, student: &TrainableNetwork, teacher: &Recorded, images: &Tensor) -> Tensor {
        let maps: Vec<&Tensor> = teacher.block_outputs().collect();
        let before = |block: usize| block.checked_sub(1).map_or(teacher.stem_output(), |last| maps[last]);
        let last = before(maps.len());
        let logits = student.classify(&pool(last)).narrow(1, 0, teacher.logits.size()[1]);
        let ends =
            relative_error(&student.stem(images), teacher.stem_output()) + relative_error(&logits, &teacher.logits);
        self.segments.iter().fold(ends, |sum, segment| {
            let made = student.segment(before(segment.teacher.start), segment.student.clone());
            sum + relative_error(&made, maps[segment.teacher.end - 1])
        })
    }
}

/// The blocks of each stage.
fn stages(spec: &NetworkSpec) -> Vec<Range<usize>> {
    let mut stages: Vec<Range<usize>> = Vec::new();
    for (index, block) in spec.blocks.iter().enumerate() {
        match stages.last_mut().filter(|stage| spec.blocks[stage.start].stage() == block.stage()) {
            Some(stage) => stage.end = index + 1,
            None => stages.push(index..index + 1),
        }
    }
    stages
}

/// The mean squared error over the mean square of what is wanted.
fn relative_error(made: &Tensor, wanted: &Tensor) -> Tensor {
    made.to_kind(Kind::Float).mse_loss(wanted, Reduction::Mean)
        / wanted.square().mean(Kind::Float).clamp_min(SMALLEST)
}

/// The attention map `[N, H W]` of maps `[N, C, H, W]`: their mean square over the channels, of length one an image.
fn attention(maps: &Tensor) -> Tensor {
    let energy = maps.to_kind(Kind::Float).square().mean_dim([1i64].as_slice(), false, Kind::Float).flatten(1, -1);
    &energy / energy.norm_scalaropt_dim(2.0, [1i64].as_slice(), true).clamp_min(SMALLEST)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tch::{Device, Tensor};

    use super::*;
    use crate::model::checkpoint::Checkpoint;
    use crate::model::network::FrozenNetwork;
    use crate::model::trainable::Metadata;

    fn spec(arch: &str) -> NetworkSpec {
        NetworkSpec::fresh(arch, 3, 5).unwrap()
    }

    fn student(arch: &str, seed: i64) -> TrainableNetwork {
        tch::manual_seed(seed);
        TrainableNetwork::fresh(&spec(arch), Device::Cpu)
    }

    /// A network as a teacher, whose running statistics are those of `images`.
    fn settled(network: &TrainableNetwork, images: &Tensor) -> FrozenNetwork {
        tch::no_grad(|| (0..150).for_each(|_| drop(network.forward(images))));
        let metadata = Metadata::new(network.spec().arch(), &[0.5; 3], &[0.5; 3], [8, 8], &[]);
        let checkpoint = Checkpoint::parse(network.to_safetensors(&metadata).into()).unwrap();
        FrozenNetwork::load(network.spec(), &checkpoint, Device::Cpu, Kind::Float)
    }

    fn images() -> Tensor {
        tch::manual_seed(7);
        Tensor::randn([32, 3, 8, 8], (Kind::Float, Device::Cpu))
    }

    #[test]
    fn a_student_that_is_the_teacher_is_at_no_distance() {
        let _alone = crate::testing::drawing_alone();
        for arch in ["resnet14", "resnet14-projection"] {
            let (same, images) = (student(arch, 1), images());
            let teacher = settled(&same, &images);
            let hints = Hints::between(same.spec(), teacher.spec()).unwrap();
            let shown = teacher.forward(&images, false);
            let together = |student: &TrainableNetwork| hints.together(&student.forward_with_maps(&images).1, &shown);
            let apart = |student: &TrainableNetwork| hints.apart(student, &shown, &images);
            // Batch norm keeps unbiased variances, so the two are not equal to the last digit.
            assert!(together(&same).double_value(&[]) < 0.01, "{arch}: {:?}", together(&same));
            assert!(apart(&same).double_value(&[]) < 0.05, "{arch}: {:?}", apart(&same));
            let other = student(arch, 2);
            assert!(together(&other).double_value(&[]) > 0.5, "{arch}: {:?}", together(&other));
            assert!(apart(&other).double_value(&[]) > 0.5, "{arch}: {:?}", apart(&other));
        }
    }

    #[test]
    fn every_parameter_learns_whatever_the_depths() {
        let _alone = crate::testing::drawing_alone();
        let images = images();
        for (teacher, student_arch) in [("resnet14", "resnet14"), ("resnet14", "resnet8"), ("resnet8", "resnet20")] {
            let teacher = settled(&student(teacher, 1), &images);
            let shown = teacher.forward(&images, false);
            for learns_apart in [true, false] {
                let student = student(student_arch, 2);
                let hints = Hints::between(student.spec(), teacher.spec()).unwrap();
                hints.check_apart(student.spec(), teacher.spec()).unwrap();
                let distance = if learns_apart {
                    hints.apart(&student, &shown, &images)
                } else {
                    hints.together(&student.forward_with_maps(&images).1, &shown)
                };
                distance.backward();
                for (name, parameter) in student.parameters() {
                    // The head sees no map but the last: only the blockwise distance has a part for it.
                    let expected = learns_apart || !name.starts_with("linear");
                    let learns =
                        parameter.grad().defined() && parameter.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0;
                    assert_eq!(learns, expected, "{student_arch}: {name}, apart: {learns_apart}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let _alone = crate::testing::drawing_alone();
        let narrow = {
            let wide = student("resnet18", 1);
            Hints::between(wide.spec(), &spec("resnet20"))
        };
        assert!(matches!(narrow, Err(NoHints::Stages { .. })), "{narrow:?}");
        // A pruned network: other widths, the same stages.
        let mut pruned = spec("resnet20");
        pruned.blocks.iter_mut().take(3).for_each(|block| block.out_width = 12);
        let hints = Hints::between(&pruned, &spec("resnet20")).unwrap();
        let refused = hints.check_apart(&pruned, &spec("resnet20"));
        assert!(matches!(refused, Err(NoHints::Widths { .. })), "{refused:?}");
    }

    #[test]
    fn attention_says_where_and_not_in_which_channel() {
        let _alone = crate::testing::drawing_alone();
        let maps = images().relu();
        let turned = Tensor::cat(&[maps.narrow(1, 1, 2), maps.narrow(1, 0, 1)], 1);
        let distance = |a: &Tensor, b: &Tensor| (attention(a) - attention(b)).abs().max().double_value(&[]);
        assert!(distance(&maps, &turned) < 1e-6);
        assert!(distance(&maps, &(&maps * 3.0)) < 1e-6, "nor how strong");
        assert!(distance(&maps, &maps.flip([3])) > 1e-2);
    }
}
