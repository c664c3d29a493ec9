"""SIMULATION: a shop and its shoppers, for the demo, for tests and for watching a loop improve.

The model, in order of its parts:

Shop. I items in 24 categories of 6 departments. An item has a unit taste vector (its category's
direction plus noise), a brand, a log-normal price around its category's, and a quality in
[-1, 1]. Every item has three *companions*: those items of its category's two complementary
categories that lie nearest to it after a fixed rotation of taste space (tea after a teapot).

Shoppers. A unit taste vector that drifts between visits, favourite categories, a sensitivity to
price, a boredom with what they have seen already, a patience, a rate of visits, loyalty to a
brand, and cycles after which consumables are bought again.

Needs. A visit begins with a need: a consumable that is due, else what the last visit left open,
else a favourite category. After a click the need follows: to a companion of the item (more often
once it lies in the cart), else on to items like it. So what comes next depends on what was just
done, which a model of sequences can learn and a list of best-sellers cannot. The recommender is
given none of this: it sees the events alone.

A page. K items at positions 1..K. A position is looked at with probability k**-0.35; the first
item looked at that appeals is clicked (the cascade model, Craswell et al. 2008), with probability
sigmoid(U),
    U = -5.2 + 1.0 taste.z + 2.6 need.z + 0.8 [category needed] + 2.2 [exactly the companion]
        + 0.6 [favourite brand] + 0.5 quality - price_sensitivity * log(price / category's price)
        - boredom * times seen
What is clicked may go to the cart, what is in the cart may be bought at the end of the visit or be
taken out, and what was bought and is poor may come back. A shopper without a click loses patience.

Bots fetch pages at machine speed in catalogue order and never buy.

    shop       items                     pure
    shoppers   who they are, how they choose   pure
    history    a past of plain browsing  pure
    population the views of very many  pure
    impressions pages in the order of a recommender, with the truth behind the clicks  pure
    live       visits on a running suite over gRPC

Numbers from here say nothing about people. They are labelled SIMULATION wherever they show.
"""
